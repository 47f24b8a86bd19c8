"""Errors a user can cause. Each says what is wrong, where, what is allowed and what to do next.

The command line prints the message without a traceback and exits with status 2. Broken invariants of our
own are `assert`s and keep their traceback.
"""


class LinearizeError(ValueError):
    """Base of every error that is the user's to mend."""


class RecipeError(LinearizeError):
    """A recipe or an override is wrong; holds every problem found, one a line."""


class ModelError(LinearizeError):
    """A model, tokenizer or exported folder is missing, damaged or of the wrong kind."""


class ArchitectureError(ModelError):
    """The model's attention cannot be replaced; the message says why."""


class DataError(LinearizeError):
    """The training text is missing, empty, too short or has other columns."""


class TrainingError(LinearizeError):
    """Training cannot go on: a loss is not finite, or a checkpoint belongs to another recipe."""


class ExportError(LinearizeError):
    """The result could not be written or did not reload to the same logits."""
