"""Which tokens the loss is a mean over."""

import torch

# Label of a token that the loss leaves out: PyTorch's cross-entropy ignores it by default.
IGNORE_INDEX = -100


def find_labels(labels: torch.Tensor) -> torch.Tensor:
    """Flat indices (into B*T) of the label tokens: int64[..., T] -> int64[n].

    The first token of a row is never one: no token before it could predict it.
    """
    is_label = labels != IGNORE_INDEX
    is_label[..., 0] = False
    return is_label.flatten().nonzero().squeeze(-1)


def count_labels(labels: torch.Tensor) -> int:
    """Number of label tokens in int64[..., T], see `find_labels`."""
    return len(find_labels(labels))
