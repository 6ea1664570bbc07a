"""python -m dataset.scenes FOLDER: write the rendered demo set, see dataset/scenes/write.py."""

from common.errors import run_command
from dataset.scenes.write import main

if __name__ == "__main__":
    run_command(main)
