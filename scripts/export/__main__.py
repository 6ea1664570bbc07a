"""Write a trained model in the formats of other tools.

python -m scripts.export out/demo/sft_vlm_128.pth --to transformers --out exported
python -m scripts.export out/demo/sft_vlm_128.pth --to transformers onnx gguf web --out exported
python -m scripts.export out/demo/sft_vlm_128.pth --push_to_hub OWNER/NAME

The folder is a transformers directory, and what a model page of a hub shows. ONNX graphs are in
onnx/, GGUF files in gguf/, a web page in web/. It appears when all is written.
"""

from importlib import import_module
from pathlib import Path

from common.errors import UserError, run_command
from common.files import folder_in_one_go
from common.flags import parse_flags
from common.packages import check_packages
from inference.paths import find_model_files
from scripts.export.config import ExportConfig
from scripts.export.web_library import find_library

# Packages that a format needs besides requirements.txt.
PACKAGES = {
    "transformers": (),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "gguf": ("gguf",),
    "web": ("onnx", "onnxscript", "onnxruntime"),
}
# Each has a function write(vlm, folder, config).
WRITERS = {
    "transformers": "transformers_directory",
    "onnx": "onnx_graphs",
    "gguf": "gguf_files",
    "web": "web_folder",
}


def main() -> None:
    # Flags, packages and files are checked before PyTorch and transformers are imported.
    config = parse_flags(ExportConfig(), __doc__)
    for name in config.formats:
        check_packages("requirements-export.txt", *PACKAGES[name])
    find_model_files(config.weights, config.tokenizer, config.vision_model)
    out = Path(config.out)
    # A link that leads nowhere cannot be replaced either.
    if out.exists() or out.is_symlink():
        raise UserError(f"{out} exists already: delete it, or pass another --out")
    if "web" in config.formats:
        find_library(config.web_library)
    from inference import load_vlm

    # load
    vlm = load_vlm(
        config.weights, tokenizer=config.tokenizer, vision_model=config.vision_model, device="cpu"
    )
    # write
    with folder_in_one_go(out) as folder:
        for name in config.formats:
            import_module(f"scripts.export.{WRITERS[name]}").write(vlm, folder, config)
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        print(f"{path.stat().st_size / 1e6:10.3f} MB  {path}")

    # upload
    if config.push_to_hub:
        from scripts.export.push import push

        print(f"uploading to {config.push_to_hub} on {config.hub}", flush=True)
        print(f"page: {push(out, config.push_to_hub, config.hub)}")


if __name__ == "__main__":
    run_command(main)
