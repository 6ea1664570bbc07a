"""After training: load a model and ask it.

from inference import load_vlm
vlm = load_vlm("out/demo")
print(vlm.ask("cat.jpg", "What is this?"))
"""

from typing import TYPE_CHECKING

from common.threads import choose_threads

if TYPE_CHECKING:
    from inference.load import VLM, load_vlm

__all__ = ["VLM", "load_vlm"]


def __getattr__(name: str):
    # PyTorch takes seconds to import, so it waits until a model is loaded: --help needs none.
    if name in __all__:
        choose_threads()
        import inference.load

        return getattr(inference.load, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
