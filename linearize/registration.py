"""Makes `AutoConfig` and `AutoModelForCausalLM` know our model type, without importing transformers.

`import linearize` must be fast (the command line starts with it) and must also be all it takes to load an
exported folder, in whichever order the two are imported. So a stand-in is entered in AutoConfig's public
table: at once where that table is loaded, else right after it is. The real classes replace it when the first
config of ours is read.
"""

import importlib.util
import sys
from importlib.abc import MetaPathFinder
from types import ModuleType

MODEL_TYPE = "linearized"
_TABLE_MODULE = "transformers.models.auto.configuration_auto"


class LinearizedConfigStandIn:
    """The entry for our model type until the first config of it is read."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """What AutoConfig calls: registers the real classes, then reads the config with them."""
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        from linearize.modeling_linearized import register

        register()
        config_class = CONFIG_MAPPING[MODEL_TYPE]
        assert config_class is not cls, "register() left the stand-in in place"
        return config_class.from_dict(config_dict, **kwargs)


class _AfterTableLoads(MetaPathFinder):
    """Finds nothing itself: lets the table's module load as ever and then enters the stand-in."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != _TABLE_MODULE:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            sys.meta_path.insert(0, self)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_enter(module: ModuleType) -> None:
                execute(module)
                _enter(module)

            spec.loader.exec_module = execute_and_enter  # this module's own loader instance, nobody else's
        return spec


_FINDER = _AfterTableLoads()


def announce() -> None:
    """Enters our model type in AutoConfig's table, now or when it loads. May be called again."""
    if _TABLE_MODULE in sys.modules:
        _enter(sys.modules[_TABLE_MODULE])
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)


def _enter(table_module: ModuleType) -> None:
    if MODEL_TYPE not in table_module.CONFIG_MAPPING:
        table_module.CONFIG_MAPPING.register(MODEL_TYPE, LinearizedConfigStandIn)
