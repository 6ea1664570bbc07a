"""What only a GPU can show."""

import pytest
import torch

from common.errors import UserError
from dataset.vlm_dataset import VLMDataset
from inference import load_vlm
from model.weights import save_weights
from tests.helpers import TOKENIZER, small_model
from trainer.collate import make_loader
from trainer.image_encoder import ImageEncoder
from trainer.loop import accumulate_gradients
from trainer.meter import Meter
from trainer.runtime import Runtime
from trainer.sampler import StepSampler

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


def train_a_step(device: str, data: VLMDataset) -> dict[str, torch.Tensor]:
    """Weights after an optimizer step of two batches; an error if the host waits for the GPU."""
    runtime = Runtime(torch.device(device), torch.float32)
    model = small_model().to(device).train()
    model.vision_encoder.requires_grad_(False)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-3, fused=True)
    images = ImageEncoder(model.vision_encoder, data.processor.image_processor, runtime.device)
    sampler = StepSampler(data.lengths, 12, accumulation_steps=2)
    micro_batches = list(make_loader(data, sampler, 0, pin_memory=device == "cuda"))
    meter = Meter(runtime)
    torch.cuda.set_sync_debug_mode("error" if device == "cuda" else "default")
    try:
        accumulate_gradients(model, images, micro_batches, meter, runtime)
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {name: weight.cpu() for name, weight in model.state_dict().items()}


def test_a_step_on_a_gpu_is_the_cpus_and_the_host_never_waits(rows_dir, processor):
    data = VLMDataset(rows_dir / "rows.jsonl", rows_dir / "images", processor, 300)
    expected = train_a_step("cpu", data)
    for name, weight in train_a_step("cuda", data).items():
        torch.testing.assert_close(weight, expected[name], atol=2e-3, rtol=0, msg=name)


@pytest.mark.parametrize("eos_token_id", [2, 600])
def test_greedy_answers_on_a_gpu_are_the_cpus(eos_token_id):
    """A left-padded batch, decoded by a CUDA graph; the host asks only now and then for the end."""
    input_ids = torch.randint(100, 600, (2, 20), generator=torch.Generator().manual_seed(0))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, :7] = 0
    answers = []
    for device in ("cpu", "cuda"):
        tokens = (
            small_model()
            .to(device)
            .generate(
                input_ids.to(device),
                attention_mask=attention_mask.to(device),
                max_new_tokens=40,
                temperature=0,
                eos_token_id=eos_token_id,
            )
        )
        answers.append(tokens.cpu())
    assert torch.equal(*answers)


def test_small_dtypes_are_for_the_cpu(vision_dir, tmp_path):
    path = tmp_path / "sft_vlm_64.pth"
    save_weights(small_model(), path)
    parts = dict(tokenizer=TOKENIZER, vision_model=vision_dir)
    with pytest.raises(UserError, match="--dtype int8 is for the CPU, not for cuda"):
        load_vlm(path, dtype="int8", device="cuda", **parts)
