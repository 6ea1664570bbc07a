"""What `python -m scripts.export` can be told."""

import re
from dataclasses import dataclass
from typing import Literal

from common.errors import UserError
from common.flags import check_options, option

FORMATS = ("transformers", "onnx", "gguf", "web")


@dataclass(frozen=True)
class ExportConfig:
    """Options of `python -m scripts.export`."""

    weights: str = option(
        "",
        "the model: a .pth file, a folder of them, or a transformers directory",
        group="what to export",
        positional=True,
    )
    to: list[Literal["transformers", "onnx", "gguf", "web"]] = option(
        [], "formats: transformers, onnx, gguf, web; if not given, transformers"
    )
    out: str = option("exported", "new folder that is written")
    tokenizer: str | None = option(
        None, "folder of the tokenizer; if not given, the one the model was trained with"
    )
    vision_model: str | None = option(
        None, "folder of the vision encoder; if not given, the one the model was trained with"
    )
    web_library: str | None = option(
        None,
        "folder with the packages of the web page, as `npm pack` fetches them; if not given, npm "
        "is asked for them once",
    )
    gguf_class_token: Literal["first", "last", "none"] = option(
        "first",
        "where the class token of CLIP is in GGUF files: first is right once llama.cpp's bug "
        "#25814 is fixed, last is for llama.cpp as it is now, none leaves it out (docs/export.md)",
    )

    push_to_hub: str | None = option(
        None, "OWNER/NAME: upload the folder there when it is written; if not given, nowhere"
    )
    hub: Literal["huggingface", "modelscope"] = option(
        "huggingface", "where --push_to_hub uploads to, with the login of that hub's own client"
    )

    def __post_init__(self):
        check_options(self)
        if self.push_to_hub is not None and not re.fullmatch(
            r"\w[\w.-]*/\w[\w.-]*", self.push_to_hub
        ):
            raise UserError(
                f"--push_to_hub {self.push_to_hub!s:.100} is no repository: give it as OWNER/NAME"
            )

    @property
    def formats(self) -> list[str]:
        """The formats that are written, each once, in the order of FORMATS."""
        return [name for name in FORMATS if name in (self.to or FORMATS[:1])]
