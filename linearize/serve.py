"""An OpenAI-compatible server of an exported folder: that of `transformers serve`, with our model put into it.

transformers' server looks a model's class up by its name among transformers' own, so it finds no converted one (nor
any other whose code lies in its folder). Here the model is loaded first and handed over; the rest is transformers'.
"""

import time

from .errors import LinearizeError
from .loading import load


def serve(folder, *, host: str = "localhost", port: int = 8000, device: str = "auto") -> None:
    """Serves the converted model in `folder` until it is interrupted; clients name it as `folder` is given.

    One request runs at a time, on the model's own cache of constant size. Raises ModelError where the folder is not
    a converted model, LinearizeError where the server's packages are not installed.
    """
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise LinearizeError('the server needs more packages: pip install "linearize[serve]"')
    from transformers.cli.serve import Serve

    model, tokenizer = load(folder, device=device)
    # Else a client's temperature is passed over: the server takes it, but only ever turns sampling off, at 0. A request
    # without one samples at the model's own, or at 1, as it does at OpenAI.
    model.generation_config.do_sample = True
    name = str(folder)
    entry = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "linearize"}

    class Server(Serve):
        def start_server(self):
            """Called when all else stands (transformers' own would start a thread)."""
            manager = self._model_manager
            manager.force_model = name  # requests for another model are refused
            manager._load_model = lambda *_, **__: model
            manager._load_processor = lambda *_, **__: tokenizer
            manager.get_gen_models = lambda: [entry]  # else what lies in the hub's cache
            print(f"serving {name!r} at http://{host}:{port}/v1", flush=True)
            self.server.run()

    Server(host=host, port=port, model_timeout=-1, non_blocking=True)
