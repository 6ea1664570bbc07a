"""A web page to talk with a model about pictures.

    python web_demo_vlm.py --out_dir out/demo        # then open http://localhost:8000

The page itself is inference/web_page.py.
"""

import importlib.util
import signal
import subprocess
import sys

from common.errors import UserError, run_command
from common.flags import parse_flags
from inference.config import WebConfig
from inference.paths import find_model

MAX_UPLOAD_MB = 20  # of a picture
DEFAULTS = WebConfig(max_new_tokens=256)


def main() -> None:
    config = parse_flags(DEFAULTS, __doc__)
    # Streamlit runs this file again, in a process of its own.
    if "streamlit" in sys.modules:
        from inference.web_page import show_page

        show_page(config)
        return

    # Flags and files are checked before Streamlit starts.
    find_model(config)
    if importlib.util.find_spec("streamlit") is None:
        raise UserError("the web page needs Streamlit: pip install streamlit")
    sys.exit(serve(config))


def serve(config: WebConfig) -> int:
    """Start Streamlit on this very file, for this machine only; returns its exit status."""
    options = {
        "server.address": "localhost",
        "server.port": config.port,
        "server.headless": "true",
        "server.maxUploadSize": MAX_UPLOAD_MB,
        "server.fileWatcherType": "none",
        "browser.gatherUsageStats": "false",
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    command = [sys.executable, "-m", "streamlit", "run", *flags, __file__, "--", *sys.argv[1:]]
    print(f"starting on http://localhost:{config.port} (Ctrl-C ends it)", flush=True)
    process = subprocess.Popen(command)
    # Who ends this process means the page; Ctrl-C reaches both.
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.wait()
        return 0


if __name__ == "__main__":
    run_command(main)
