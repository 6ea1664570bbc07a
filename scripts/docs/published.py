"""Every flag of the published scripts of February 2025, and what it does here."""

from typing import NamedTuple

SAME, OTHER, IGNORED = "the same", "another meaning", "accepted, does nothing"
TRAIN, EVAL, WEB = "train", "eval", "web"
ALL = (TRAIN, EVAL, WEB)


class Published(NamedTuple):
    """A row of the table.

    Args:
        scripts: those that had the flag: TRAIN, EVAL, WEB.
        effect: SAME, OTHER or IGNORED.
        note: what differs.
    """

    scripts: tuple[str, ...]
    effect: str
    note: str = ""


PUBLISHED = {
    "--out_dir": Published(ALL, SAME, "the published web page did not read it"),
    "--epochs": Published((TRAIN,), SAME),
    "--batch_size": Published((TRAIN,), SAME),
    "--accumulation_steps": Published(
        (TRAIN,),
        SAME,
        "a step's loss is the mean over all its label tokens; what is left over at the end of an "
        "epoch makes a step of its own",
    ),
    "--learning_rate": Published((TRAIN,), SAME),
    "--grad_clip": Published((TRAIN,), SAME),
    "--max_seq_len": Published(
        ALL,
        SAME,
        "in training; otherwise tokens of prompt and answer together (published: letters of the "
        "prompt, and as many new tokens again)",
    ),
    "--num_workers": Published((TRAIN,), SAME, "8 if not given, as published; 0 on a CPU"),
    "--data_path": Published((TRAIN,), SAME),
    "--images_path": Published((TRAIN,), SAME),
    "--use_wandb": Published((TRAIN,), SAME),
    "--wandb_project": Published((TRAIN,), SAME),
    "--device": Published(ALL, SAME),
    "--dim": Published(
        ALL, SAME, "read off the weights if not given; the published web page took 768"
    ),
    "--n_layers": Published(ALL, SAME, "read off the weights if not given"),
    "--temperature": Published((EVAL, WEB), SAME),
    "--top_p": Published((EVAL, WEB), SAME),
    "--load": Published((EVAL, WEB), SAME, "1 reads the directory without running code in it"),
    "--model_mode": Published((EVAL,), SAME, "2 also asks about several pictures at once"),
    "--log_interval": Published(
        (TRAIN,),
        OTHER,
        "counts optimizer steps (published: batches, the same without accumulation)",
    ),
    "--save_interval": Published(
        (TRAIN,), OTHER, "counts optimizer steps; once a minute and at the end if not given"
    ),
    "--warmup_iters": Published((TRAIN,), OTHER, "it warms up; published, it did nothing"),
    "--dtype": Published(
        (TRAIN,),
        OTHER,
        "bfloat16 or float32, and that is what runs (published: always float16 on a GPU); float16 "
        "is refused, it would need a scaled loss",
    ),
    "--ddp": Published(
        (TRAIN,),
        OTHER,
        "refuses to start outside torchrun; published, it did nothing. Both use all GPUs under "
        "torchrun, with or without it",
    ),
    "--use_multi": Published(
        (EVAL,), OTHER, "2 means --model_mode 2; the pictures of each folder are asked about once"
    ),
    "--local_rank": Published(
        (TRAIN,), IGNORED, "torchrun and deepspeed also tell each process its rank without it"
    ),
    "--stream": Published((EVAL, WEB), IGNORED, "answers are always shown as they come"),
    "--lora_name": Published((EVAL, WEB), IGNORED, "it had no effect there either"),
    "--use_moe": Published(
        ALL, IGNORED, "False is accepted, True is refused: there is no mixture of experts here"
    ),
}


def write_table() -> list[str]:
    """Lines of a section of the page of flags."""
    lines = [
        "## Flags of the published scripts",
        "",
        "Those of [minimind-v](https://github.com/jingyaogong/minimind-v) in February 2025, all of",
        "them: of `train_pretrain_vlm.py` and `train_sft_vlm.py` (train), `eval_vlm.py` (eval) and",
        "`web_demo_vlm.py` (web). For one that does nothing, a line says what to use now.",
        "",
    ]
    for effect in (SAME, OTHER, IGNORED):
        lines += [f"### {effect.capitalize()}", "", "| flag | of | what differs |", "|---|---|---|"]
        for name, row in PUBLISHED.items():
            if row.effect == effect:
                lines.append(f"| `{name}` | {', '.join(row.scripts)} | {row.note} |")
        lines.append("")
    return lines
