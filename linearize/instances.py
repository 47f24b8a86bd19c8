"""Attributes of single modules set for a while: how parts of a model are swapped without touching their classes."""

from contextlib import contextmanager


@contextmanager
def swapped(changes):
    """Inside, each (module, name, value) of `changes` holds; on leaving, every module is as before.

    Written past torch.nn.Module's own bookkeeping, which a model of thousands of modules waits for: not for parameters,
    buffers or submodules.
    """
    changes = [(vars(module), name, value) for module, name, value in changes]
    before = [(own, name, name in own, own.get(name)) for own, name, _ in changes]
    for own, name, value in changes:
        own[name] = value
    try:
        yield
    finally:
        for own, name, had, value in reversed(before):
            if had:
                own[name] = value
            else:
                del own[name]
