"""The files of an evaluation: JSON, a Markdown table, and a page of answers with their pictures.

The page is one file that opens anywhere: pictures are inside it, it has no script and no link.
"""

import base64
import io
import json
import random
from collections import defaultdict
from datetime import date
from html import escape
from pathlib import Path

from PIL import Image

from common.errors import BadSampleError
from common.files import write_text
from common.text import IMAGE_TAG
from inference.questions import Question
from inference.report import (
    explain_scores,
    list_scores,
    name_columns,
    save_score,
    show_markdown,
    show_score,
)
from model.image import load_image

# Questions of the page: the best, as many of the worst, and some at random.
N_BEST, N_RANDOM = 10, 20
# Of one question: pictures, right answers, and characters of a text.
MOST_PICTURES, MOST_ANSWERS, MOST_CHARACTERS = 4, 10, 1000
# Pixels of the longer side: of a picture, and of one that does not belong to the question.
SIDE, SMALL_SIDE = 320, 96
STYLE = """
body { max-width: 1000px; margin: 2.5em auto 4em; padding: 0 1.2em; color: #1f2937;
  background: #fff; font: 16px/1.55 system-ui, "Noto Sans", "Noto Sans CJK SC", sans-serif }
h1 { font-size: 1.6em; margin: 0 0 .2em; overflow-wrap: anywhere }
h2 { font-size: 1.2em; margin: 2.2em 0 .6em }
p { margin: .3em 0 }
.quiet { color: #6b7280; font-size: .9em }
.wide { overflow-x: auto; margin: 1.2em 0 .4em }
table { border-collapse: collapse; font-size: .95em; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .2em 1.4em .2em 0; white-space: nowrap }
th { color: #6b7280; font-weight: normal }
tr.first td { border-top: 1px solid #e5e7eb }
.range { color: #6b7280; font-size: .9em }
.answer { display: flex; gap: 1.6em; padding: 1.2em 0; border-top: 1px solid #e5e7eb;
  break-inside: avoid }
.pictures { flex: 0 0 200px; display: flex; flex-wrap: wrap; gap: 6px; align-content: flex-start }
.pictures img { border-radius: 5px; width: 200px }
.pictures img:not(:only-child) { width: 97px }
.text { flex: 1; min-width: 0; overflow-wrap: anywhere }
.given { font-size: 1.15em }
dl { display: grid; grid-template-columns: 7.5em 1fr; gap: .4em .8em; margin: .6em 0 0 }
dt { color: #6b7280 }
dd { margin: 0; min-width: 0 }
dd img { width: 48px; border-radius: 3px; margin: 0 .6em .2em 0; float: left }
@media (max-width: 600px) { .answer { flex-direction: column; gap: .6em }
  .pictures { flex-basis: auto }
  table { font-size: .8em } th, td { padding-right: .7em; vertical-align: top }
  th, td:nth-child(-n+2) { white-space: normal } .range { display: block }
  dl { grid-template-columns: 1fr; gap: .1em } dd { margin-bottom: .4em } }
"""


def save_reports(
    path: Path,
    reports: dict[str, dict],
    questions: list[Question],
    dataset,
    weights: Path,
    data: list[str],
) -> None:
    """Write the report and what belongs to it, and say where.

    Args:
        path: of the JSON; with metrics, NAME.md and NAME.html come beside it.
        reports: see inference/report.py.
        questions: all of them.
        dataset: has their pictures.
        weights: what was asked.
        data: names of the data files.
    """
    # the report itself; without metrics, that of a single choice of images has no name for it
    first = next(iter(reports.values()))
    is_full = "metrics" in first
    content = reports if len(reports) > 1 or is_full else first
    write_text(path, json.dumps(content, ensure_ascii=False, indent=1))
    print(f"report: {path}")
    name = " ".join(Path(file).name for file in data)
    if "right" in reports:
        save_score(weights, name, reports)

    # for people
    if is_full:
        title = f"{weights.name} on {name}"
        table, page = path.with_suffix(".md"), path.with_suffix(".html")
        write_text(table, show_markdown(title, reports))
        print(f"table: {table}")
        write_page(page, title, reports, questions, dataset)
        print(f"answers with their pictures: {page}")


def write_page(
    path: Path, title: str, reports: dict[str, dict], questions: list[Question], dataset
) -> None:
    """Write the page, see `save_reports`."""
    # which questions, by the answers with the right pictures, if they were asked
    reports = dict(sorted(reports.items(), key=lambda report: report[0] != "right"))
    order = rank_answers(next(iter(reports.values()))["answers"])
    n_best = min(N_BEST, len(order) // 2)
    drawn = random.Random(0).sample(range(len(order)), min(N_RANDOM, len(order)))
    sections = {
        "The best answers": order[::-1][:n_best],
        "The worst answers": order[:n_best],
        "Answers at random": drawn,
    }

    # the scores, then the sections
    parts = [f'<p class="quiet">{date.today().isoformat()}, {count_questions(reports)}']
    parts += [show_table(reports), f'<p class="quiet">{escape(explain_scores(reports))}']
    for name, indices in sections.items():
        if indices:
            parts.append(f"<h2>{name}</h2>")
            parts += [show_answer(index, reports, questions[index], dataset) for index in indices]
    title = escape(title)
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{STYLE}</style>"
    )
    body = "\n".join(parts)
    write_text(
        path, f'<!doctype html>\n<html lang="en">{head}\n<h1>{title}</h1>\n{body}\n</html>\n'
    )


def rank_answers(answers: list[dict]) -> list[int]:
    """Indices of answers, the worst first: by CIDEr-D, or whether they are right, then by loss.

    Each type is ranked by itself, and has as large a share of the worst as of all.
    """
    by_type = defaultdict(list)
    for index, answer in enumerate(answers):
        scores = answer["scores"]
        quality = scores.get("CIDEr-D", 0), answer["is_right"], -scores.get("loss", 0)
        by_type[answer["type"]].append((quality, index))
    places = []
    for group in by_type.values():
        for place, (_, index) in enumerate(sorted(group)):
            places.append(((place + 0.5) / len(group), index))
    return [index for _, index in sorted(places)]


def count_questions(reports: dict[str, dict]) -> str:
    """ "2,000 questions about 1,000 pictures"."""
    first = next(iter(reports.values()))
    return f"{first['questions']:,} questions about {first['pictures']:,} pictures"


def show_table(reports: dict[str, dict]) -> str:
    """The table of scores."""
    names = "".join(f"<th>{name}</th>" for name in ["", "", *name_columns(reports)])
    rows = [f"<tr>{names}</tr>"]
    for line in list_scores(reports):
        # the interval is quieter than the score
        texts = (escape(text).partition(" (") for text in line[2:])
        cells = "".join(f"<td>{escape(text)}</td>" for text in line[:2])
        cells += "".join(
            f'<td>{value} <span class="range">{(mark + ends).strip()}</span></td>'
            for value, mark, ends in texts
        )
        rows.append(f'<tr class="first">{cells}</tr>' if line[0] else f"<tr>{cells}</tr>")
    return f'<div class="wide"><table>{"".join(rows)}</table></div>'


def show_answer(index: int, reports: dict[str, dict], question: Question, dataset) -> str:
    """A question with its pictures, what was answered, and what is right."""
    # the answer, with its scores
    (images, report), *blind = reports.items()
    answer = report["answers"][index]
    scores = [
        f"{name} {show_score(name, value)}"
        for name, value in answer["scores"].items()
        if name not in ("exact", "perplexity")
    ]
    if "CIDEr-D" not in answer["scores"]:
        scores = ["right" if answer["is_right"] else "wrong", *scores]
    asked = answer["question"].replace(IMAGE_TAG, "").strip()
    parts = [
        f'<p class="quiet" dir="auto">{show_text(asked)}',
        f'<p class="given" dir="auto">{show_text(answer["given"])}',
        f'<p class="quiet">{", ".join(scores)}',
    ]

    # what it is compared with, and what the model says without seeing the pictures
    right = answer.get("references", [answer["answer"]])[:MOST_ANSWERS]
    items = "".join(f'<div dir="auto">{show_text(text)}</div>' for text in right)
    facts = [("right answers" if len(right) > 1 else "right answer", items)]
    for (name, other), column in zip(blind, name_columns(dict(blind))):
        given = f'<div dir="auto">{show_text(other["answers"][index]["given"])}</div>'
        facts.append((column, show_pictures(question, name, dataset, SMALL_SIDE) + given))
    parts.append("<dl>" + "".join(f"<dt>{name}<dd>{fact}" for name, fact in facts) + "</dl>")

    pictures = show_pictures(question, images, dataset, SIDE)
    pictures = pictures or '<span class="quiet">no picture</span>'
    return (
        f'<div class="answer"><div class="pictures">{pictures}</div>'
        f'<div class="text">{"".join(parts)}</div></div>'
    )


def show_text(text: str) -> str:
    """A text as text, without what cannot be printed; a long one is cut."""
    text = "".join(c if c.isprintable() else " " for c in text)
    return escape(text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}…")


def show_pictures(question: Question, images: str, dataset, side: int) -> str:
    """The first pictures that came with a question, as <img> with a JPEG inside."""
    row, shown = question.shown[images], []
    if row is None:
        return ""
    try:
        _, pictures = dataset.read(row)
        pictures = pictures[: len(question.images)][:MOST_PICTURES]
        # several share the place of one, and so the size of the page is bounded
        side = side if len(pictures) == 1 else side // 2
        for picture in pictures:
            image = load_image(picture)
            image.thumbnail((side, side), Image.Resampling.BICUBIC)
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=85)
            content = base64.b64encode(buffer.getvalue()).decode()
            shown.append(f'<img alt="" src="data:image/jpeg;base64,{content}">')
    # It could be read a minute ago.
    except BadSampleError as error:
        shown.append(f'<span class="quiet">{show_text(str(error))}</span>')
    return "".join(shown)
