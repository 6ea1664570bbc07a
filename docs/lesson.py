# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# <!-- docs/lesson.ipynb is made from docs/lesson.py: edit that file, then run
#      python -m scripts.lesson
# ruff: noqa: E402
# -->
#
# # How a language model learns to see
#
# A lesson of 45 minutes. You need no GPU: every cell takes less than 20 seconds on two CPU cores.
#
# A language model reads text and writes text. It has never seen anything. In this lesson we look
# at how it gets eyes, step by step, with a model so small that nothing is hidden:
#
# | | | minutes |
# |---|---|---|
# | 1 | What it can do | 4 |
# | 2 | A picture is 196 patches | 4 |
# | 3 | What the vision encoder says of each patch | 6 |
# | 4 | The splice: a picture takes the place of words | 7 |
# | 5 | Which tokens the loss counts | 4 |
# | 6 | What learns, and when | 4 |
# | 7 | Twenty training steps | 5 |
# | 8 | Where does it look? | 5 |
# | 9 | The right picture, a wrong one, none | 3 |
# | 10 | Another size | 3 |
#
# Exercises with answers are at the end.
#
# **Before you start.** Run each cell with Shift + Enter. The first one finds the code. In Colab it
# also fetches and installs it, which takes some minutes: put the address of this repository into
# it first (it is under the *Code* button of the page).

# %%
import os
import subprocess
import sys
from pathlib import Path

ADDRESS = "ADDRESS"

folders = [Path.cwd(), *Path.cwd().parents]
root = next((path for path in folders if (path / "model" / "LMConfig.py").is_file()), None)
if root is None:
    subprocess.run(["git", "clone", ADDRESS, "minimind-v"], check=True)
    root = Path("minimind-v").resolve()
    requirements = ["-r", str(root / "requirements.txt")]
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", *requirements], check=True)
os.chdir(root)

# %%
import random
import tempfile
import time

import torch

from dataset.scenes.scene import draw_scene, sample_scene
from docs import lesson_figures as figures
from inference import load_vlm

# %% [markdown]
# ## 1. What it can do
#
# Our model has only 1.3 million parameters, and it knows only one small world: colored shapes on a
# light ground. In that world it answers questions.
#
# The picture below is new: the training pictures show no thing with these combinations of color,
# shape and size. So the model cannot know the answers by heart. It has to look.

# %%
vlm = load_vlm("model/demo/sft_vlm_128.pth", device="cpu")
model, processor = vlm.model, vlm.processor


def sample_clear_scene(rng):
    """Three things, never seen in training, that differ in color and in shape."""
    while True:
        scene = sample_scene(rng, held_out=True, n_things=3)
        if all(len({getattr(t, name) for t in scene.things}) == 3 for name in ("color", "shape")):
            return scene


rng = random.Random(1)
scene = sample_clear_scene(rng)
picture = draw_scene(scene)

# %%
questions = [f"What color is the {thing.shape}?" for thing in scene.things]
answers = [vlm.ask(picture, question, temperature=0) for question in questions]
expected = [f"The {thing.shape} is {thing.color}." for thing in scene.things]
n_right = sum(answer == right for answer, right in zip(answers, expected))
print(f"right answers: {n_right} of {len(questions)}")
figures.draw_dialogue(picture, questions, answers)

# %% [markdown]
# It answers in whole sentences, since it is a language model. (It speaks Chinese too: try
# `vlm.ask(picture, "一共有几个东西？")`, "How many things are there?")
#
# From here on we open the box.

# %% [markdown]
# ## 2. A picture is 196 patches
#
# A language model reads a row of tokens. So the picture has to become a row, too. We cut it into
# small squares, called **patches**, and read them like a text: from left to right, line by line.

# %%
pixel_values = processor.preprocess([picture])
print("pictures, colors, height, width:", tuple(pixel_values.shape))

thing = max(scene.things, key=lambda thing: thing.size == "large")
figures.draw_patches(picture, n_side=14, patch=thing.patch)

# %% [markdown]
# One patch alone shows very little: one color, perhaps an edge. What it is a part of, one can only
# tell from the patches around it. That is the next step.

# %% [markdown]
# ## 3. What the vision encoder says of each patch
#
# The **vision encoder** turns each patch into a list of numbers, its *features*: 128 numbers in
# our small one, 768 in CLIP, which the larger models use. While it works, each patch looks at all
# the other patches. So the numbers of a patch can say "I am in the middle of a star", and not only
# "I am yellow".
#
# The encoder was trained before. It is **frozen**: it never changes in this lesson.

# %%
features = model.encode_images(pixel_values)[0]
print("patches, numbers of each:", tuple(features.shape))
print("the first numbers of patch", thing.patch, "are", features[thing.patch, :4].tolist())

# %% [markdown]
# Nobody can read such numbers. But we can compare them. Two lists of numbers that point in the same
# direction have a similarity of 1 (the *cosine* of the angle between them).
#
# - In the middle: how similar is each patch to the one in the orange frame?
# - On the right: we squeeze the numbers of a patch into three, and use these as red, green and
#   blue. Patches with like numbers get like colors. (Such a squeeze is called PCA.)

# %%
directions = torch.nn.functional.normalize(features, dim=1)
similarity = directions @ directions[thing.patch]  # (196,)

centered = features - features.mean(dim=0)
_, _, axes = torch.pca_lowrank(features, q=3)
colors = centered @ axes  # (196, 3)
colors = (colors - colors.amin(0)) / (colors.amax(0) - colors.amin(0))

figures.draw_features(picture, thing.patch, similarity.view(14, 14), colors.view(14, 14, 3))

# %% [markdown]
# The colors on the right are not those of the picture. They only say: "here is something, there is
# something else, and all this is ground". Look for the patch in the middle of each thing: it speaks
# for the whole thing. Nobody told the encoder where the things are in this picture.
#
# Can one read the color and the shape from **one** patch? We take the patch in the middle of each
# thing in 64 training pictures, and remember the mean of the features for every word: the mean
# "red", the mean "star". In new pictures we then look which mean a patch is most similar to.


# %%
def collect_patches(n_scenes, held_out):
    """(things, float[n, 128] features of the patch in the middle of each)."""
    scenes = [sample_scene(rng, held_out, n_things=4) for _ in range(n_scenes)]
    seen = model.encode_images(processor.preprocess([draw_scene(s) for s in scenes]))
    things = [thing for s in scenes for thing in s.things]
    return things, torch.stack([seen[i // 4, thing.patch] for i, thing in enumerate(things)])


known_things, known = collect_patches(64, held_out=False)
new_things, new = collect_patches(12, held_out=True)


# %%
def read_word(attribute):
    """A title, and the share of new patches whose word is right."""
    words = [getattr(thing, attribute) for thing in known_things]
    names = sorted(set(words))
    means = [known[[word == name for word in words]].mean(dim=0) for name in names]
    means = torch.stack(means) - known.mean(dim=0)  # (words, 128)
    scores = torch.nn.functional.normalize(new - known.mean(dim=0), dim=1) @ (
        torch.nn.functional.normalize(means, dim=1).T
    )
    read = [names[index] for index in scores.argmax(dim=1)]
    n_right = sum(word == getattr(t, attribute) for word, t in zip(read, new_things))
    return f"{attribute}:\n1 of {len(names)} words", n_right / len(read)


shares = dict(read_word(attribute) for attribute in ("color", "shape", "size"))
figures.draw_shares(shares, f"read from one patch, in {len(new_things)} new things")

# %% [markdown]
# ## 4. The splice: a picture takes the place of words
#
# Now the most important step, and it is a small one.
#
# A language model does not read words. It looks up each token in a table, the **embeddings**, and
# takes the row it finds there: 128 numbers that mean this token. What goes into the model is a
# stack of such rows.
#
# 1. In the text, a picture is written as 196 times the token `@`. These keep the places free.
# 2. A single linear layer, the **projector**, turns the features of a patch into such a row.
# 3. The 196 rows of the patches take the places of the 196 rows of `@`. That is the *splice*.
#
# To the language model a patch is then a word like any other word.

# %%
turns = [{"role": "user", "content": f"<image>\nWhat color is the {thing.shape}?"}]
input_ids = processor.encode_prompt(turns, n_images=1)

with torch.no_grad():
    before = model.tok_embeddings(input_ids)[0]
    after = model.embed(input_ids, pixel_values)[0]

is_image = input_ids[0] == model.config.image_token_id
changed = (before != after).any(dim=1)
print(f"{len(before)} tokens, {int(is_image.sum())} of them are @")
print(f"rows that the splice changed: {int(changed.sum())}, all of them @: ", end="")
print(bool((changed == is_image).all()))

# %%
first = int(is_image.nonzero()[0])
figures.draw_splice(before, after, is_image, {first + t.patch: t.shape for t in scene.things})

# %% [markdown]
# Here the rows stand upright, side by side, and you see the first 48 of their 128 numbers: red is
# above zero, blue below. The patches of the ground are much alike; those in the middle of a thing
# differ.
#
# And this is really all that the projector does: a matrix and a bias.

# %%
layer = model.vision_proj.vision_proj[0]
with torch.no_grad():
    by_hand = features @ layer.weight.T + layer.bias
print("the same rows, by hand:", torch.allclose(by_hand, after[is_image], atol=1e-4))
print("its parameters:", " + ".join(str(tuple(p.shape)) for p in layer.parameters()))

# %% [markdown]
# ## 5. Which tokens the loss counts
#
# Training shows the model a conversation and asks, at every token: *what comes next?* The **loss**
# is small if the model gave the right token a high probability.
#
# But we do not want a model that asks questions. So the loss counts only the tokens of the answer,
# and the `</s>` with which an answer ends. All other tokens are read, but they do not count. In the
# code their label is -100.

# %%
conversation = [*turns, {"role": "assistant", "content": f"The {thing.shape} is {thing.color}."}]
sample = processor.encode(conversation, [picture], max_length=640)

words, counts = [], []
for token, label in zip(sample["input_ids"].tolist(), sample["labels"].tolist()):
    is_patch = token == model.config.image_token_id
    if not (is_patch and words and words[-1] == "@ × 196"):
        text = processor.tokenizer.decode([token]).strip(" ").replace("\n", "\\n")
        words.append("@ × 196" if is_patch else text)
        counts.append(label != -100)
print(len(sample["input_ids"]), "tokens;", sum(counts), "of them count")
figures.draw_tokens(words, counts)

# %% [markdown]
# ## 6. What learns, and when
#
# Training has two stages.
#
# 1. **Pretraining**: the model describes pictures. Only the projector and the last layer of the
#    language model learn. The model can talk already; it only has to learn what patches mean.
# 2. **SFT** (supervised fine-tuning): the model answers questions. Now the projector and the whole
#    language model learn.
#
# The vision encoder learns in neither. Here are the numbers for the size of the published model.
# The cell builds it as `model/LMConfig.py` says, with random weights.

# %%
from model.LMConfig import VLMConfig
from model.model_vlm import MiniMindVLM
from trainer.build import set_trainable

full_size = MiniMindVLM(VLMConfig())
last_layer = f"layers.{full_size.config.n_layers - 1}."
stages = {
    "pretraining": lambda name: name.startswith(("vision_proj.", last_layer)),
    "SFT": lambda name: True,
}
learns = {}
for stage, is_trainable in stages.items():
    count = sum(parameter.numel() for parameter in set_trainable(full_size, is_trainable))
    learns[stage] = {name for name, p in full_size.named_parameters() if p.requires_grad}
    print(f"{stage}: {count:,} parameters learn")

# %%
figures.draw_trainable(full_size, learns)

# %% [markdown]
# Our demo model has the same parts, only smaller: 6 layers, 128 wide.

# %%
demo_last = f"layers.{model.config.n_layers - 1}."
stages["pretraining"] = lambda name: name.startswith(("vision_proj.", demo_last))
for stage, is_trainable in stages.items():
    count = sum(parameter.numel() for parameter in set_trainable(model, is_trainable))
    print(f"{stage} of the demo: {count:,} parameters learn")

# %% [markdown]
# ## 7. Twenty training steps
#
# We start where pretraining starts: with a language model that has read about colored shapes but
# has never seen one, and with a projector of random numbers. We draw 160 pictures with descriptions
# and train for twenty steps of 8 pictures. Watch the loss at the end of the progress bar.

# %%
from dataset.mixture import open_data
from dataset.scenes.write import write_scene_set
from trainer.build import build_model
from trainer.config import TrainConfig
from trainer.loop import train
from trainer.runtime import start_runtime

folder = Path(tempfile.mkdtemp())
write_scene_set(folder, {"pretrain": 160})

# %%
config = TrainConfig(
    init_weights="model/demo/lm_128.pth",
    data_path=[str(folder / "pretrain_vlm_data.jsonl")],
    images_path=[str(folder / "images")],
    batch_size=8,
    learning_rate=2e-3,
    log_interval=1,
    out_dir=str(folder),
    device="cpu",
    feature_cache_gb=0,
)
runtime = start_runtime(config)
student, student_processor = build_model(config, runtime)
set_trainable(student, stages["pretraining"])
data = open_data(config.data_path, config.images_path, student_processor, config.max_seq_len)
result = train(student, data, config, runtime=runtime)

# %%
import json
import math

log = result.weights.with_suffix(".log.jsonl").read_text().splitlines()
losses = [entry["loss"] for entry in map(json.loads, log) if entry["event"] == "train"]
print(f"loss in step 1: {losses[0]:.2f}, in step {len(losses)}: {losses[-1]:.2f}")
figures.draw_loss(losses, guess=math.log(student.config.vocab_size))

# %% [markdown]
# In step 1 the loss is *higher* than that of a blind guess: the projector fills 196 places with
# noise, and the model is sure of wrong things. In a few steps it learns to live with the pictures.
# The run also warns that so few pictures do not teach a model to look. Does it see anything yet?
# Let it describe our picture.

# %%
student.eval()
request = "<image>\nDescribe the picture."
prompt = processor.encode_prompt([{"role": "user", "content": request}], n_images=1)
for name, network in (("after 20 steps", student), ("trained model", model)):
    tokens = network.generate(prompt, pixel_values, max_new_tokens=40, temperature=0)
    text = processor.tokenizer.decode(tokens[0, prompt.shape[1] :], skip_special_tokens=True)
    print(f"{name}: {text}")

# %% [markdown]
# After twenty steps it has learned the *form* of a description. Things and places come later, after
# some hundred steps: first the words, then the seeing. (E7 means: column E, line 7.)

# %% [markdown]
# ## 8. Where does it look?
#
# When the model writes a word, it may look back at every token before: at the words, and at the
# patches. How much it looks at each is called **attention**. It is a list of shares that add up
# to 1. Every layer has several *heads*, and each head looks for something else.
#
# The model does not keep these shares, so we compute them, with its own layers:

# %%
from model.model_lm import apply_rope


@torch.no_grad()
def find_attention(model, hidden):
    """Embeddings float[1, T, dim] -> shares of the last token, float[layers, heads, T]."""
    rope, shares = model.rope[: hidden.shape[1]], []
    for layer in model.layers:
        attention, x = layer.attention, layer.attention_norm(hidden)
        queries = attention.wq(x[:, -1:]).unflatten(-1, (-1, attention.head_dim))
        keys = attention.wk(x).unflatten(-1, (-1, attention.head_dim))
        queries, keys = apply_rope(queries, rope[-1:])[0, 0], apply_rope(keys, rope)[0]
        keys = keys.repeat_interleave(len(queries) // keys.shape[1], dim=1)  # (T, heads, head_dim)
        scores = torch.einsum("hd,thd->ht", queries, keys) / attention.head_dim**0.5
        shares.append(scores.softmax(dim=-1))
        hidden = layer(hidden, rope, None, None)
    return torch.stack(shares)


# %% [markdown]
# We ask "What color is the star?" and put the words "The star is" into the model's mouth. Its next
# word has to be the color. Where does it look in this moment?


# %%
@torch.no_grad()
def look(scene, thing):
    """(likeliest next word, its probability, shares of patches float[layers, heads, 196])."""
    turns = [{"role": "user", "content": f"<image>\nWhat color is the {thing.shape}?"}]
    begun = processor.tokenizer(f"The {thing.shape} is", add_special_tokens=False)["input_ids"]
    prompt = processor.encode_prompt(turns, n_images=1)
    input_ids = torch.cat([prompt, torch.tensor([begun])], dim=1)
    pixels = processor.preprocess([draw_scene(scene)])
    embeddings = model.embed(input_ids, pixels)
    probabilities = model(input_ids, pixels).logits[0, -1].softmax(dim=-1)
    best = probabilities.max(dim=-1)
    word = processor.tokenizer.decode([int(best.indices)]).strip()
    shares = find_attention(model, embeddings)[:, :, input_ids[0] == model.config.image_token_id]
    return word, float(best.values), shares


# %% [markdown]
# The model has 6 layers of 4 heads: 24 heads. Which of them looks for the thing that the question
# is about? We choose it with other pictures: the head that gives the largest share of its attention
# to the patches of that thing.

# %%
from dataset.scenes.scene import RADII


def find_patches(thing):
    """bool[196]: the patches that the thing covers, at least in part."""
    centers = torch.arange(14) * 16 + 8
    reach = RADII[thing.size] + 8
    rows, columns = (centers - thing.y).abs() < reach, (centers - thing.x).abs() < reach
    return (rows[:, None] & columns).flatten()


on_thing = []
for _ in range(4):
    other = sample_clear_scene(rng)
    on_thing += [look(other, t)[2][:, :, find_patches(t)].sum(-1) for t in other.things]
on_thing = torch.stack(on_thing).mean(dim=0)  # (layers, heads)
layer, head = divmod(int(on_thing.argmax()), on_thing.shape[1])
area = sum(find_patches(t).sum() for t in scene.things) / len(scene.things) / 196
print(f"layer {layer + 1}, head {head + 1}: {on_thing[layer, head]:.0%} of its attention")
print(f"is on the thing, which covers {area:.0%} of the picture")

# %% [markdown]
# Now our own picture, and the same question about each of the three things.

# %%
maps, titles = [], []
for thing in scene.things:
    word, probability, shares = look(scene, thing)
    maps.append(shares[layer, head].view(14, 14))
    titles.append(f"The {thing.shape} is …\n{word} ({probability:.0%})")
figures.draw_attention(picture, maps, titles)

# %% [markdown]
# The picture is the same, the weights are the same. Only one word of the question differs, and the
# model looks at another place. Nobody has taught it where to look: it was only told which word
# comes next.

# %% [markdown]
# ## 9. The right picture, a wrong one, none
#
# A model that answers well may still not look. Perhaps it only guesses well. There is a simple
# test: ask the same question with the right picture, with another picture, and with none.


# %%
def sample_pair(rng):
    """(thing, its scene, a scene in which the same shape has another color)."""
    while True:
        first, second = sample_clear_scene(rng), sample_clear_scene(rng)
        for one in first.things:
            for two in second.things:
                if one.shape == two.shape and one.color != two.color:
                    return one, first, second


thing, right, wrong = sample_pair(rng)
question = f"What color is the {thing.shape}?"
pictures = [draw_scene(right), draw_scene(wrong), None]
answers = [vlm.ask(shown, question, temperature=0) for shown in pictures]
names = ["right picture", "wrong picture", "no picture"]
print(question, dict(zip(names, answers)))
figures.draw_answers(pictures, names, answers, question)

# %% [markdown]
# With the wrong picture a model that looks gives the answer for *that* picture. With no picture it
# has to guess, and it does so without a word of doubt: it was never taught to say "I do not know".
#
# One example proves nothing. So we count.

# %%
n_right = dict.fromkeys(names, 0)
n_questions = 10
for _ in range(n_questions):
    thing, right, wrong = sample_pair(rng)
    question, answer = f"What color is the {thing.shape}?", f"The {thing.shape} is {thing.color}."
    for name, shown in zip(n_right, (draw_scene(right), draw_scene(wrong), None)):
        n_right[name] += vlm.ask(shown, question, temperature=0, max_new_tokens=20) == answer
print("right answers:", n_right, "of", n_questions)
shares = {name: n / n_questions for name, n in n_right.items()}
figures.draw_shares(shares, f"right answers to {n_questions} questions about color")

# %% [markdown]
# Whenever somebody shows you a model that "sees", ask for these three bars.

# %% [markdown]
# ## 10. Another size
#
# The size of the language model is written in one place, `model/LMConfig.py`:

# %%
import inspect

from model.LMConfig import LMConfig

for name in ("dim", "n_layers", "n_kv_heads", "rope_theta"):
    print(inspect.signature(LMConfig).parameters[name])

# %% [markdown]
# `dim` is the width: how many numbers mean a token. `n_layers` is the depth: how often the rows
# are worked over. What you write there is the default of every script of this repository. The
# first bar below follows it as well; the others are for comparison.

# %%
names, millions, milliseconds = [], [], []
for sizes in ({}, dict(dim=128, n_layers=6), dict(dim=256, n_layers=8), dict(dim=768, n_layers=16)):
    network = MiniMindVLM(VLMConfig(**sizes)).eval()
    source = "" if sizes else "\n(model/LMConfig.py)"
    names.append(f"dim {network.config.dim}, {network.config.n_layers} layers{source}")
    millions.append(sum(parameter.numel() for parameter in network.parameters()) / 1e6)
    with torch.no_grad():
        image_features = torch.zeros(1, 196, 768)
        network(input_ids, image_features=image_features)  # the first time is slower
        start = time.perf_counter()
        network(input_ids, image_features=image_features)
    milliseconds.append(1000 * (time.perf_counter() - start))
figures.draw_sizes(names, millions, milliseconds)

# %% [markdown]
# **Do it yourself.** Open `model/LMConfig.py`, write another `dim` or `n_layers`, save, restart
# this notebook (*Kernel → Restart*), and run section 6 and this one again. To train a model of your
# size from random weights:
#
#     python train_pretrain_vlm.py --init_weights none
#
# Its second line says which size it takes. If the run starts from weights (without
# `--init_weights none`), the weights decide, and the line says that too.

# %% [markdown]
# ## Exercises
#
# Think first, then open the answer.
#
# **1.** A picture of 448 × 448 pixels is cut into patches of 16 × 16. How many tokens is that? What
# becomes slower?
#
# <details><summary>Answer</summary>
#
# 28 × 28 = 784 tokens, four times as many. Attention compares every token with every token before
# it, so that part takes 16 times as long; the rest takes about four times as long.
#
# </details>
#
# **2.** The projector has 393,728 parameters in the published model. CLIP gives 768 numbers a patch
# and the language model is 512 wide. Show that the number is right.
#
# <details><summary>Answer</summary>
#
# A matrix of 768 × 512 = 393,216 and a bias of 512. Together 393,728.
#
# </details>
#
# **3.** Somebody writes `me@home.org` in a question. Does the model take the `@` for a picture?
#
# <details><summary>Answer</summary>
#
# No. Only a run of exactly 196 `@` (or 392, 588 …) stands for pictures; see `find_image_tokens` in
# `model/model_vlm.py`. Any other `@` stays text.
#
# </details>
#
# **4.** What would go wrong if the loss also counted the 196 image tokens?
#
# <details><summary>Answer</summary>
#
# Their label would always be `@`, 196 times, whatever the picture shows. The model would learn to
# write `@` after `@`, which is easy and useless, and most of the loss would come from it: the
# answer has ten tokens.
#
# </details>
#
# **5.** Why does not everything learn in pretraining?
#
# <details><summary>Answer</summary>
#
# At first the projector gives noise. If the whole language model learned from that, it would change
# its good weights to fit noise, and forget how to talk. Also, fewer parameters need less memory.
#
# </details>
#
# **6.** The loss of a model that finds all 672 tokens equally likely is 6.51. Why?
#
# <details><summary>Answer</summary>
#
# The loss is minus the natural logarithm of the right token's probability: −ln(1 / 672) = 6.51.
# For the published tokenizer with 6,400 tokens it is 8.76.
#
# </details>
#
# **7.** (at the computer) In section 8, use another head: set `layer` and `head` to the smallest
# value of `on_thing`. What does the figure show?
#
# <details><summary>Answer</summary>
#
# `layer, head = divmod(int(on_thing.argmin()), on_thing.shape[1])`. This head looks at something
# else: at words, at the ground, or at all patches alike. Heads share the work.
#
# </details>
#
# **8.** (at the computer) Ask the model something it was never taught: `vlm.ask(picture, "What is
# the name of the artist?")`. What do you learn from the answer?
#
# <details><summary>Answer</summary>
#
# It answers all the same, with a sentence of the kind it knows. A model does not know what it does
# not know; only tests like that of section 9 show what an answer is worth.
#
# </details>
#
# ## What next
#
# - The whole network is two short files: `model/model_lm.py` and `model/model_vlm.py`.
# - `make demo` trains the model of this lesson from the start, in seven minutes.
# - `docs/training.md` tells how to train the published size on photographs.
