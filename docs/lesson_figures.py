"""The figures of docs/lesson.ipynb: what is drawn is computed there."""

import matplotlib.pyplot as plt
import torch
from matplotlib.patches import FancyBboxPatch, Rectangle
from PIL.Image import Image

GREY, BLUE, ORANGE, INK = "#d5dae1", "#4c78c9", "#f28e2b", "#22303c"
# Large enough to be read on a wall.
STYLE = {
    "font.size": 16,
    "axes.titlesize": 19,
    "axes.titlepad": 10,
    "figure.dpi": 72,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.use": True,
}
plt.rcParams.update(STYLE)


def start_figure(n_panels: int, width: float = 15, height: float = 5.4, **options) -> list:
    """A row of panels without axes."""
    _, panels = plt.subplots(1, n_panels, figsize=(width, height), squeeze=False, **options)
    for panel in panels[0]:
        panel.set(xticks=[], yticks=[])
        panel.spines[:].set_visible(False)
    return list(panels[0])


def outline(panel, patch: int, n_side: int, size: float) -> None:
    """A frame around a patch, in a picture of n_side x n_side patches of that size."""
    row, column = divmod(patch, n_side)
    corner = (column * size - 0.5, row * size - 0.5)
    panel.add_patch(Rectangle(corner, size, size, fill=False, edgecolor="white", linewidth=5))
    panel.add_patch(Rectangle(corner, size, size, fill=False, edgecolor=ORANGE, linewidth=3))


def draw_dialogue(picture: Image, questions: list[str], answers: list[str]) -> None:
    """A picture, and beside it questions with answers."""
    left, right = start_figure(2, width=13, height=5.6, width_ratios=(1, 1.25))
    left.imshow(picture)
    for row, (question, answer) in enumerate(zip(questions, answers)):
        top = 0.92 - row * 0.95 / len(questions)
        right.text(0.02, top, question, va="top", fontsize=24)
        right.text(0.08, top - 0.11, answer, va="top", fontsize=26, color=ORANGE, weight="bold")


def draw_patches(picture: Image, n_side: int, patch: int) -> None:
    """The picture, the same cut into patches, and one of them."""
    size = picture.width // n_side
    whole, cut, one = start_figure(3)
    whole.imshow(picture)
    whole.set_title(f"the picture:\n{picture.width} × {picture.height} pixels")

    # the patches, with a gap between them
    gap = size // 4
    step = size + gap
    ground = Rectangle((-gap, -gap), n_side * step + gap, n_side * step + gap)
    ground.set(color="#8b95a1", zorder=-1)
    cut.add_patch(ground)
    for row in range(n_side):
        for column in range(n_side):
            box = (column * size, row * size, (column + 1) * size, (row + 1) * size)
            left, top = column * step, row * step
            cut.imshow(picture.crop(box), extent=(left, left + size, top + size, top))
    cut.set(xlim=(-gap, n_side * step), ylim=(n_side * step, -gap), xticks=[], yticks=[])
    cut.set_title(f"cut into {n_side} × {n_side}\n= {n_side**2} patches")
    row, column = divmod(patch, n_side)
    corner = (column * step - gap / 2, row * step - gap / 2)
    cut.add_patch(Rectangle(corner, step, step, fill=False, edgecolor=ORANGE, linewidth=4))

    box = (column * size, row * size, (column + 1) * size, (row + 1) * size)
    one.imshow(picture.crop(box))
    one.set_title(f"patch {patch}:\n{size} × {size} pixels")


def draw_features(picture: Image, patch: int, similarity, colors) -> None:
    """What the vision encoder says.

    Args:
        picture: the picture.
        patch: the one that the others are compared with.
        similarity: float[n_side, n_side], at most 1.
        colors: float[n_side, n_side, 3], from 0 to 1.
    """
    n_side = len(similarity)
    left, middle, right = start_figure(3)
    left.imshow(picture)
    outline(left, patch, n_side, picture.width / n_side)
    left.set_title(f"the picture, and patch {patch}")
    image = middle.imshow(similarity, vmax=1, cmap="magma")
    outline(middle, patch, n_side, 1)
    middle.set_title("how similar is each patch to it?")
    plt.colorbar(image, ax=middle, shrink=0.85)
    right.imshow(colors)
    right.set_title("like numbers, like color")


def draw_splice(
    before: torch.Tensor, after: torch.Tensor, is_image: torch.Tensor, marks: dict[int, str]
) -> None:
    """The rows of a sequence before and after the splice, each drawn as a column.

    Args:
        before: float[T, dim].
        after: float[T, dim].
        is_image: bool[T].
        marks: position in the sequence -> what is there.
    """
    positions = is_image.nonzero().squeeze(-1)
    first, last = int(positions[0]), int(positions[-1])
    titles = ("before: 196 times the same row, that of @", "after: 196 rows made from patches")
    _, panels = plt.subplots(2, 1, figsize=(15, 8.4), sharex=True)
    for panel, rows, title in zip(panels, (before, after), titles):
        # every row at the same strength, as the norm in front of the first layer makes it
        rows = (rows / rows.square().mean(dim=1, keepdim=True).sqrt())[:, :48].T
        panel.imshow(rows, aspect="auto", cmap="RdBu_r", vmin=-2.5, vmax=2.5)
        frame = Rectangle((first - 0.5, -0.5), last - first + 1, len(rows), fill=False)
        frame.set(edgecolor=ORANGE, linewidth=4)
        panel.add_patch(frame)
        pad = 50 if panel is panels[1] else 10
        panel.set_title(title.replace("196", str(len(positions))), pad=pad)
        panel.set(yticks=[], ylabel="numbers of\na row")
    for position, word in marks.items():
        arrow = dict(arrowstyle="-|>", color=INK, linewidth=2)
        panels[1].annotate(
            word,
            (position, -0.5),
            (0, 24),
            textcoords="offset points",
            ha="center",
            arrowprops=arrow,
        )
    panels[1].set_xticks(
        [first / 2, (first + last) / 2, (last + len(before)) / 2], ["words", "the picture", "words"]
    )
    panels[1].tick_params(length=0, labelsize=18)


def draw_tokens(words: list[str], is_label: list[bool]) -> None:
    """A sequence as boxes, those that the loss counts in orange."""
    panel = start_figure(1, height=4)[0]
    width, line, x, y = 96.0, 7.5, 0.0, 0.0
    for word, counts in zip(words, is_label):
        length = 1.35 * max(2, len(word)) + 1.2
        if x + length > width:
            x, y = 0.0, y - line
        box = FancyBboxPatch((x, y), length, 5.5, boxstyle="round,pad=0,rounding_size=1")
        box.set(facecolor=ORANGE if counts else GREY, edgecolor="white")
        panel.add_patch(box)
        place = (x + length / 2, y + 2.6)
        panel.text(*place, word, ha="center", va="center", family="monospace", fontsize=16)
        x += length + 0.6
    panel.set(xlim=(-1, width + 1), ylim=(y - 2, 8))
    panel.set_title("orange: the loss counts these tokens; grey: it does not")


def draw_trainable(model: torch.nn.Module, trainable: dict[str, set[str]]) -> None:
    """The parts of a model, one column for each stage; what learns is orange.

    Args:
        model: a MiniMindVLM.
        trainable: name of the stage -> names of the parameters that learn in it.
    """
    # parameters of each part, from the picture to the answer
    parts: dict[str, dict[str, int]] = {}
    titles = {"vision_proj": "projector", "tok_embeddings": "embeddings", "norm": "norm"}
    for name, parameter in model.named_parameters():
        words = name.split(".")
        is_layer = words[0] == "layers"
        title = f"layer {int(words[1]) + 1}" if is_layer else titles[words[0]]
        parts.setdefault(title, {})[name] = parameter.numel()
    parts.pop("norm")
    order = ["projector", "embeddings", *(title for title in parts if title.startswith("layer"))]

    # a column for each stage
    panels = start_figure(len(trainable), height=7.5)
    for panel, (stage, names) in zip(panels, trainable.items()):
        blocks = [("vision encoder (CLIP)", "never learns", False)]
        for title in order:
            size = sum(parts[title].values())
            blocks.append((title, f"{size / 1e6:.1f} M", bool(names & parts[title].keys())))
        for y, (title, note, learns) in enumerate(blocks):
            box = FancyBboxPatch((0, y), 10, 0.8, boxstyle="round,pad=0,rounding_size=0.15")
            box.set(facecolor=ORANGE if learns else GREY, edgecolor="white")
            panel.add_patch(box)
            panel.text(0.4, y + 0.4, title, va="center")
            panel.text(9.6, y + 0.4, note, va="center", ha="right")
        count = sum(p.numel() for name, p in model.named_parameters() if name in names)
        panel.set(xlim=(-0.5, 10.5), ylim=(-0.3, len(blocks) + 0.1))
        panel.set_title(f"{stage}: {count / 1e6:.1f} M learn", fontsize=24, weight="bold")


def draw_loss(losses: list[float], guess: float) -> None:
    """A loss curve, and the loss of a model that guesses."""
    _, panel = plt.subplots(figsize=(12, 5.4))
    steps = range(1, len(losses) + 1)
    panel.axhline(guess, color=BLUE, linestyle="--", linewidth=2)
    panel.text(len(losses), guess + 0.12, "all tokens equally likely", color=BLUE, ha="right")
    panel.plot(steps, losses, color=ORANGE, linewidth=4, marker="o", markersize=8)
    for step in (1, len(losses)):
        place = (step, losses[step - 1])
        panel.annotate(
            f"{place[1]:.2f}",
            place,
            (0, 14),
            textcoords="offset points",
            ha="center",
            fontsize=20,
            weight="bold",
        )
    panel.set(xlabel="training step", ylabel="loss", ylim=(0, max(*losses, guess) * 1.12))
    panel.set_xticks([1, *range(5, len(losses) + 1, 5)])


def draw_attention(picture: Image, maps: list[torch.Tensor], titles: list[str]) -> None:
    """The picture, then where each word looks: bright where the attention is.

    Args:
        picture: the picture.
        maps: for each word float[n_side, n_side], 0 or more.
        titles: one for each word.
    """
    panels = start_figure(1 + len(maps), width=4.6 * (1 + len(maps)), height=5.6)
    panels[0].imshow(picture)
    panels[0].set_title("the picture\n")
    extent = (0, picture.width, picture.height, 0)
    for panel, weights, title in zip(panels[1:], maps, titles):
        strength = (weights / weights.max()).numpy()
        panel.imshow(picture, extent=extent)
        # a dark sheet with holes where the attention is
        panel.imshow(
            torch.zeros(*weights.shape, 3), alpha=0.75 * (1 - strength), extent=extent, vmax=1
        )
        patch, n_side = int(weights.argmax()), len(weights)
        size = picture.width / n_side
        row, column = divmod(patch, n_side)
        frame = Rectangle((column * size, row * size), size, size, fill=False)
        panel.add_patch(frame)
        frame.set(edgecolor=ORANGE, linewidth=4)
        panel.set_title(title)


def draw_answers(
    pictures: list[Image | None], titles: list[str], answers: list[str], question: str
) -> None:
    """A question, and pictures with a title above and the answer below; None is a grey field."""
    panels = start_figure(len(pictures), width=5 * len(pictures), height=6.8)
    plt.suptitle(question, fontsize=26)
    for panel, picture, title, answer in zip(panels, pictures, titles, answers):
        if picture is None:
            panel.add_patch(Rectangle((0, 0), 1, 1, color=GREY))
            panel.set_aspect("equal")
        else:
            panel.imshow(picture)
        panel.set_title(title)
        panel.set_xlabel(answer, fontsize=21, labelpad=10, color=ORANGE, weight="bold")


def draw_shares(shares: dict[str, float], title: str) -> None:
    """One bar for each name; shares are from 0 to 1."""
    _, panel = plt.subplots(figsize=(12, 3.6))
    names, values = list(shares), [100 * share for share in shares.values()]
    bars = panel.barh(names, values, color=ORANGE, height=0.7)
    panel.bar_label(bars, [f" {value:.0f} %" for value in values], fontsize=18)
    panel.set(xlim=(0, 112), xticks=[], title=title, ylim=(len(names) - 0.5, -0.5))
    panel.spines[:].set_visible(False)
    panel.tick_params(length=0, labelsize=18)


def draw_sizes(names: list[str], millions: list[float], milliseconds: list[float]) -> None:
    """Two bars for each size: its parameters, and its time."""
    _, panels = plt.subplots(1, 2, figsize=(15, 4.6), sharey=True)
    titles = ("parameters, in millions", "time for a picture and a question, in ms")
    for panel, values, title, color in zip(
        panels, (millions, milliseconds), titles, (BLUE, ORANGE)
    ):
        bars = panel.barh(names, values, color=color, height=0.7)
        panel.bar_label(bars, [f" {value:,.{int(value < 100)}f}" for value in values], fontsize=18)
        panel.set(xticks=[], title=title, xlim=(0, max(values) * 1.2))
        panel.spines[:].set_visible(False)
        panel.tick_params(length=0, labelsize=18)
    panels[0].invert_yaxis()
