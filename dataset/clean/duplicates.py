"""Pictures that are the same, or nearly: one photograph re-encoded, resized or lightly retouched."""

from collections import defaultdict

import faiss
import numpy as np
from tqdm import tqdm

HASH_BITS = 64
MAX_DISTANCE = 6  # bits in which hashes of one picture's versions differ at most
MAX_CELL_DIFFERENCE = 20  # levels of 255 in any cell and colour of their thumbnails
BANDS = 4  # of 16 bits: hashes up to 7 bits apart have a band that differs in one bit or none, so the search misses no pair
QUERIES = 1000  # hashes that are looked up at a time
MOST_COMPARED = 200  # kept pictures that one picture is compared with: plain ones may have thousands of one hash


def find_duplicates(
    digests: np.ndarray, hashes: np.ndarray, thumbnails: np.ndarray, companions: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(int32[n], the earlier picture that each one repeats, or -1; bool[n], whether only nearly).

    uint64[n] digests of the files and perceptual hashes (imagehash.phash), uint8[n, 8, 8, 3] thumbnails. A picture repeats one
    that is kept itself, so that no chain of small changes joins different pictures. int64[m, 2] `companions` are pictures that
    come together in a row: they are never repeats of each other ("What changes?").
    """
    n = len(digests)
    repeats, is_near = np.full(n, -1, np.int32), np.zeros(n, bool)
    together = {(int(a), int(b)) for pair in companions for a, b in (pair, pair[::-1])}
    first_of_digest: dict[int, int] = {}
    unique_hashes, group = np.unique(hashes, return_inverse=True)
    starts, neighbours = near_hashes(unique_hashes)
    kept_in_group: dict[int, list[int]] = defaultdict(list)
    for index in tqdm(range(n), desc="compare images", unit="image", delay=1):
        same = first_of_digest.get(int(digests[index]))
        if same is not None:
            if (same, index) not in together:
                repeats[index] = same
            continue  # a companion's very copy has nothing new to compare with
        first_of_digest[int(digests[index])] = index
        near = neighbours[starts[group[index]] : starts[group[index] + 1]].tolist()
        candidates = sorted(kept for other in near for kept in kept_in_group.get(other, ()))[
            :MOST_COMPARED
        ]
        candidates = [kept for kept in candidates if (kept, index) not in together]
        if candidates:
            difference = np.abs(thumbnails[candidates].astype(np.int16) - thumbnails[index]).max(
                axis=(1, 2, 3)
            )
            close = np.flatnonzero(difference <= MAX_CELL_DIFFERENCE)
            if len(close):
                repeats[index], is_near[index] = candidates[close[0]], True
                first_of_digest[int(digests[index])] = candidates[close[0]]
                continue
        kept_in_group[int(group[index])].append(index)
    return repeats, is_near


def near_hashes(unique: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Neighbours within MAX_DISTANCE bits of the uint64[m] different hashes, each its own among them: hash k has
    numbers[starts[k] : starts[k + 1]]. By multi-index hashing (Norouzi et al. 2012)."""
    codes = np.ascontiguousarray(unique).view(np.uint8).reshape(-1, HASH_BITS // 8)
    index = faiss.IndexBinaryMultiHash(HASH_BITS, BANDS, HASH_BITS // BANDS)
    index.nflip = 1
    index.add(codes)
    counts, numbers = [np.zeros(1, np.int64)], [np.empty(0, np.int64)]
    for start in tqdm(
        range(0, len(codes), QUERIES), desc="search near-duplicates", unit="block", delay=1
    ):
        limits, _, found = index.range_search(
            codes[start : start + QUERIES], MAX_DISTANCE + 1
        )  # below this radius
        counts.append(np.diff(limits.astype(np.int64)))
        numbers.append(found)
    return np.cumsum(np.concatenate(counts)), np.concatenate(numbers)
