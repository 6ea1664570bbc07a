"""Put what `make demo` has trained into model/demo/, in half precision.

    python -m scripts.demo.ship

The lesson, the README's picture and a first question without any training use it.
"""

import argparse
import json
from pathlib import Path

from common.errors import run_command
from common.files import write_text
from common.flags import program_name
from model.files import find_weights, info_path, read_info

TRAINED, SHIPPED = Path("out/demo/sft_vlm_128.pth"), Path("model/demo/sft_vlm_128.pth")


def main() -> None:
    argparse.ArgumentParser(program_name(), description=__doc__.splitlines()[0]).parse_args()
    find_weights(TRAINED)
    from model.weights import read_weights, save_atomically

    info = read_info(TRAINED)
    write_text(info_path(SHIPPED), json.dumps(info, ensure_ascii=False, indent=1) + "\n")
    weights = {name: weight.half() for name, weight in read_weights(TRAINED).items()}
    save_atomically(weights, SHIPPED)
    print(f"{SHIPPED}: {SHIPPED.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_command(main)
