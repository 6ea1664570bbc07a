"""What an evaluation found: as lines for a terminal, JSON, and Markdown.

    reports = {images: {"images", "questions", "accuracy", "loss", "answers"}}
    reports["right"]["accuracy"]["color"] = 0.96

`images` is "right", "wrong" or "none", and "color" a type of questions. With --metrics there are
also "pictures", "counts" (of questions by type), "scores" in each answer, and the scores by type:

    reports["right"]["metrics"]["en"]["CIDEr-D"] = {"value": 0.321, "low": 0.299, "high": 0.344}
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import date
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.files import write_text
from inference.metrics import (
    BLEU_COLUMNS,
    RESAMPLES,
    N,
    Score,
    compute_bleu,
    resample,
    score_texts,
    tokenize,
)
from inference.questions import NO_TYPE, OVERALL, Question, measure_accuracy, name_choice

# Lines of accuracy that are printed: all of them, but for sets that have a type for each row.
MAX_TYPES = 30
# References that are looked at to tell captions from answers of a word or two.
LOOKED_AT = 200
# Sums over questions: columns of the statistics that scores are made from; BLEU's come last.
COUNT, EXACT, NATS, LABELS, CIDER, ROUGE = range(6)
COLUMNS = 6 + BLEU_COLUMNS
PLAIN_SCORES = {
    "exact": lambda sums: sums[..., EXACT] / sums[..., COUNT],
    "loss": lambda sums: sums[..., NATS] / sums[..., LABELS],
    "perplexity": lambda sums: np.exp(sums[..., NATS] / sums[..., LABELS]),
}
CAPTION_SCORES = {
    "CIDEr-D": lambda sums: sums[..., CIDER] / sums[..., COUNT],
    "BLEU-4": lambda sums: compute_bleu(sums[..., -BLEU_COLUMNS:]),
    "ROUGE-L": lambda sums: sums[..., ROUGE] / sums[..., COUNT],
}
# Scores that are shown as they are; the others are shown in hundredths.
UNSCALED = "loss", "perplexity"
NAMES_SHOWN = {"exact": "exact answers"}


def group_types(questions: list[Question]) -> dict[str, list[int]]:
    """Indices of all questions, and of those of each type if there are several."""
    by_type = defaultdict(list)
    for index, question in enumerate(questions):
        by_type[question.type].append(index)
    groups = {OVERALL: list(range(len(questions)))}
    return groups if set(by_type) == {NO_TYPE} else groups | by_type


def find_captions(questions: list[Question]) -> set[str]:
    """The types whose right answers are captions: N words or more on average.

    Answers of a word or two have no runs of N words, and are right or wrong.
    """
    by_type = defaultdict(list)
    for question in questions:
        by_type[question.type].append(question.references)
    found = set()
    for type_, references in by_type.items():
        looked_at = references[:: max(1, len(references) // LOOKED_AT)]
        lengths = [len(tokenize(text)) for texts in looked_at for text in texts]
        if all(references) and sum(lengths) >= N * len(lengths):
            found.add(type_)
    return found


def number_units(questions: list[Question]) -> np.ndarray:
    """int[n]: equal for questions about the same picture, or of the same row without one."""
    pictures = {question.row: question.images[0] for question in questions if question.images}
    numbers: dict[object, int] = {}
    units = (pictures.get(question.row, question.row) for question in questions)
    return np.array([numbers.setdefault(unit, len(numbers)) for unit in units])


def collect_statistics(questions: list[Question], images: str) -> np.ndarray:
    """float[n, COLUMNS] of n questions that were answered with these images."""
    # right or wrong, and the loss
    statistics = np.zeros((len(questions), COLUMNS))
    for row, question in zip(statistics, questions):
        row[[COUNT, EXACT]] = 1, question.is_right(images)
        row[[NATS, LABELS]] = question.loss[images]

    # captions: each language is a corpus of its own
    caption_types, by_language = find_captions(questions), defaultdict(list)
    for index, question in enumerate(questions):
        if question.type in caption_types:
            by_language[question.language].append(index)
    for indices in by_language.values():
        scores = score_texts(
            [questions[index].given[images] for index in indices],
            [questions[index].references for index in indices],
        )
        statistics[indices, CIDER], statistics[indices, ROUGE] = scores.cider, scores.rouge
        statistics[indices, -BLEU_COLUMNS:] = scores.bleu
    return statistics


def measure_scores(questions: list[Question], statistics: np.ndarray) -> dict[str, dict]:
    """The scores of each type of question as {"value", "low", "high"}, see `resample`.

    Those that cannot be computed are left out, and those of captions in several languages together.
    """
    units, caption_types, found = number_units(questions), find_captions(questions), {}
    for type_, indices in group_types(questions).items():
        group = [questions[index] for index in indices]
        is_caption = caption_types.issuperset(question.type for question in group)
        has_score = is_caption and len({question.language for question in group}) == 1
        scores = CAPTION_SCORES | PLAIN_SCORES if has_score else PLAIN_SCORES
        measured = resample(statistics[indices], units[indices], scores)
        measured["exact"] = widen(measured["exact"], len(np.unique(units[indices])))
        found[type_] = {
            name: score._asdict()
            for name, score in measured.items()
            if np.isfinite([end for end in score if end is not None]).all()
        }
    return found


def widen(share: Score, n_units: int) -> Score:
    """A share of 0 or 1, which is the same in all draws, with its exact interval.

    Its end is the share with which n units would all be right, or wrong, in 2.5 % of cases.
    """
    if share.low is None or share.low < share.high or share.value not in (0, 1):
        return share
    rest = 1 - 0.025 ** (1 / n_units)
    return share._replace(high=rest) if share.value == 0 else share._replace(low=1 - rest)


def describe_answer(question: Question, images: str, row: np.ndarray | None = None) -> dict:
    """A question of the report, with the answer that was given with these images.

    Args:
        question: that was answered.
        images: "right", "wrong" or "none".
        row: its statistics, see `collect_statistics`; None for an answer without scores.
    """
    answer = {
        "type": question.type,
        "question": question.turns[-1]["content"],
        "answer": question.answer,
        "given": question.given[images],
        "is_right": question.is_right(images),
        "images": list(question.images),
    }
    if question.references:
        answer["references"] = list(question.references)
    if row is not None:
        scores = PLAIN_SCORES if row[-1] == 0 else CAPTION_SCORES | PLAIN_SCORES
        values = {name: float(compute(row)) for name, compute in scores.items()}
        answer["scores"] = {name: value for name, value in values.items() if np.isfinite(value)}
    return answer


def make_reports(questions: list[Question], choices: list[str], is_full: bool) -> dict[str, dict]:
    """The report for each choice of images.

    Args:
        questions: answered with all of them.
        choices: of images.
        is_full: whether the loss with all of them was measured, for "metrics".
    """
    reports = {}
    for images in choices:
        # what takes no package
        report = reports[images] = {
            "images": images,
            "questions": len(questions),
            "accuracy": measure_accuracy(questions, images),
        }
        losses = [question.loss[images] for question in questions if images in question.loss]
        if losses:
            nats, n_labels = map(sum, zip(*losses))
            report["loss"] = nats / n_labels

        # everything, for the report and for each answer
        rows = [None] * len(questions)
        if is_full:
            rows = collect_statistics(questions, images)
            groups = group_types(questions)
            report["counts"] = {type_: len(indices) for type_, indices in groups.items()}
            report["pictures"] = len(np.unique(number_units(questions)))
            report["metrics"] = measure_scores(questions, rows)
        report["answers"] = [
            describe_answer(question, images, row) for question, row in zip(questions, rows)
        ]
    return reports


@contextmanager
def save_answers(report: str | None) -> Iterator[Callable[[Question, str], None]]:
    """What writes each answer to a file as it comes, until the report holds them all.

    The file is NAME.answers.jsonl beside the report NAME.json; without a report there is none.
    """
    if not report:
        yield lambda question, images: None
        return
    path = Path(report).with_suffix(".answers.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:

        def save(question: Question, images: str) -> None:
            answer = {"shown": images, **describe_answer(question, images)}
            print(json.dumps(answer, ensure_ascii=False), file=file, flush=True)

        try:
            yield save
        except BaseException:
            print(f"answers so far: {path}", flush=True)
            raise
    path.unlink()


def print_reports(reports: dict[str, dict]) -> None:
    """Loss and accuracy, or all scores as a table."""
    if "metrics" in next(iter(reports.values())):
        print_scores(reports)
        return
    if "right" in reports:
        print(f"loss: {reports['right']['loss']:.4f} nats a label token")
    print_accuracy(reports)


def print_accuracy(reports: dict[str, dict]) -> None:
    """A line for all questions together, and one for each type, of the first MAX_TYPES."""
    types = list(next(iter(reports.values()))["accuracy"])
    for kind in types[:MAX_TYPES]:
        shares = [f"{100 * report['accuracy'][kind]:.1f} %" for report in reports.values()]
        if len(shares) > 1:
            shares = [f"{share} {name}" for share, name in zip(shares, name_columns(reports))]
        print(f"exact answers, {kind}: {', '.join(shares)}")
    print_rest(len(types))


def print_rest(n_types: int) -> None:
    """How many types have no line."""
    if n_types > MAX_TYPES:
        print(f"{n_types - MAX_TYPES} more types: --save_report FILE has them all")


def name_columns(reports: dict[str, dict]) -> list[str]:
    """ "right image", "wrong image", "no image"."""
    return list(map(name_choice, reports))


def list_scores(reports: dict[str, dict], most_types: int | None = None) -> list[list[str]]:
    """The lines of a table: type and number of questions, score, its values with these images.

    Captions have their scores and the loss, other types exact answers only; all questions together
    have what `measure_scores` finds.

    Args:
        reports: by choice of images.
        most_types: how many types have lines; all of them if not given.
    """
    metrics = [report["metrics"] for report in reports.values()]
    counts, lines = next(iter(reports.values()))["counts"], []
    for kind in list(counts)[:most_types]:
        names = list(metrics[0][kind])
        if kind != OVERALL:
            names = [name for name in names if name != "exact"] if "BLEU-4" in names else ["exact"]
        for name in names:
            values = [show_interval(name, metric[kind].get(name)) for metric in metrics]
            label = f"{kind} ({counts[kind]:,})" if name == names[0] else ""
            lines.append([label, NAMES_SHOWN.get(name, name), *values])
    return lines


def show_score(name: str, value: float) -> str:
    """ "32.1" of 0.321; a loss or perplexity as it is, with three digits or more."""
    if name not in UNSCALED:
        return f"{100 * value:.1f}"
    digits = 3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:,.{digits}f}"


def show_interval(name: str, score: dict | None) -> str:
    """ "32.1 (29.9–34.4)"; a perplexity without, since it follows from that of the loss."""
    if score is None:
        return "–"
    value, low, high = (
        score[end] if score[end] is None else show_score(name, score[end])
        for end in ("value", "low", "high")
    )
    return value if low is None or name == "perplexity" else f"{value} ({low}–{high})"


def explain_scores(reports: dict[str, dict]) -> str:
    """What the numbers of the table are."""
    n_pictures = next(iter(reports.values()))["pictures"]
    units = "Scores are in hundredths, the loss in nats a label token."
    if n_pictures == 1:
        return f"One picture: no intervals. {units}"
    return (
        f"In brackets: 95 % intervals, from {RESAMPLES:,} draws of {n_pictures:,} pictures with "
        f"replacement. {units}"
    )


def print_scores(reports: dict[str, dict]) -> None:
    """The table of scores, for a terminal."""
    lines = [["", "", *name_columns(reports)], *list_scores(reports, MAX_TYPES)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        texts = (f"{text:<{width}}" for text, width in zip(line, widths))
        print("  ".join(texts).rstrip())
    print_rest(len(next(iter(reports.values()))["counts"]))
    print(explain_scores(reports))


def show_markdown(title: str, reports: dict[str, dict]) -> str:
    """The same as a Markdown table, for a README."""
    lines = [["questions", "score", *name_columns(reports)], *list_scores(reports)]
    lines.insert(1, ["---"] * len(lines[0]))
    rows = ["| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines]
    return "\n".join([f"**{title}**", "", *rows, "", explain_scores(reports), ""])


def save_score(weights: Path, data: str, reports: dict[str, dict]) -> None:
    """Leave the score beside the weights, as NAME.scores.json, where the web page shows it.

    Args:
        weights: the file or directory that was asked.
        data: name of what it was asked about.
        reports: by the choice of images; "right" is among them.
    """
    report = reports["right"]
    score = {
        "exact": report["accuracy"][OVERALL],
        "data": data,
        "questions": report["questions"],
        "date": date.today().isoformat(),
    }
    others = {"wrong": "exact_wrong_image", "none": "exact_no_image"}
    score |= {
        name: reports[images]["accuracy"][OVERALL]
        for images, name in others.items()
        if images in reports
    }
    ciders = [
        scores["CIDEr-D"] for scores in report.get("metrics", {}).values() if "CIDEr-D" in scores
    ]
    if ciders:
        score["cider"] = ciders[0]["value"]
    # The weights may lie where nobody can write; the report has the score too.
    with suppress(UserError):
        write_text(weights.with_suffix(".scores.json"), json.dumps(score, ensure_ascii=False))
