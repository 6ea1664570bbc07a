"""`python -m MODULE` in a warm process (tests/preload.py) with a fresh huggingface_hub.

The client reads its environment when it is imported, and transformers has imported it already.
"""

import runpy
import sys

for name in [name for name in sys.modules if name.split(".")[0] == "huggingface_hub"]:
    del sys.modules[name]
del sys.argv[0]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
