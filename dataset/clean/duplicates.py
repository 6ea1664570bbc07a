"""Pictures that are the same, or nearly: one photograph re-encoded, resized or retouched."""

from collections import defaultdict

import faiss
import numpy as np
from tqdm import tqdm

HASH_BITS = 64
MAX_DISTANCE = 6  # bits between hashes of one picture
MAX_CELL_DIFFERENCE = 20  # of 255, in any cell of thumbnails
# Hashes up to 7 bits apart have one of 4 bands of 16 bits that differs in one bit or none, so the
# search misses no pair.
BANDS = 4
QUERIES = 1000  # hashes that are looked up at a time
# Pictures that one is compared with at most: plain ones may share a hash with thousands.
MOST_COMPARED = 200


def find_duplicates(
    pictures: np.ndarray, which: np.ndarray, together: set[tuple[int, int]]
) -> tuple[np.ndarray, np.ndarray]:
    """Find for each picture the earlier one that it repeats.

    A picture repeats one that stays itself, so that no chain of small changes joins pictures that
    differ.

    Args:
        pictures: array[m] with the fields digest, hash (uint64) and thumbnail (uint8[8, 8, 3]).
        which: int[k], numbers of the pictures to compare, ascending; the others are damaged.
        together: pairs (in either order) that a row shows together: they never repeat each other
            ("What changes?").

    Returns:
        int32[m], the number of the earlier picture or -1; bool[m], whether it is only nearly that.
    """
    repeats = np.full(len(pictures), -1, np.int32)
    is_near = np.zeros(len(pictures), bool)
    unique_hashes, group = np.unique(pictures["hash"], return_inverse=True)
    starts, neighbors = near_hashes(unique_hashes)
    first_of_digest: dict[int, int] = {}
    staying: dict[int, list[int]] = defaultdict(list)  # by group
    for index in tqdm(which.tolist(), desc="compare images", unit="image", delay=1):
        # the very same file
        digest = int(pictures["digest"][index])
        same = first_of_digest.setdefault(digest, index)
        if same != index:
            if (same, index) not in together:
                repeats[index] = same
            # A copy in the same row has nothing new to compare with.
            continue

        # similar hashes, then similar thumbnails
        near = neighbors[starts[group[index]] : starts[group[index] + 1]].tolist()
        candidates = sorted(number for other in near for number in staying.get(other, ()))
        candidates = [one for one in candidates[:MOST_COMPARED] if (one, index) not in together]
        if candidates:
            thumbnails = pictures["thumbnail"]
            difference = np.abs(thumbnails[candidates].astype(np.int16) - thumbnails[index])
            close = np.flatnonzero(difference.max(axis=(1, 2, 3)) <= MAX_CELL_DIFFERENCE)
            if len(close):
                repeats[index], is_near[index] = candidates[close[0]], True
                first_of_digest[digest] = candidates[close[0]]
                continue
        staying[int(group[index])].append(index)
    return repeats, is_near


def near_hashes(unique: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Neighbors within MAX_DISTANCE bits of the uint64[m] different hashes, themselves included.

    Those of hash k are numbers[starts[k] : starts[k + 1]] of the (starts, numbers) returned.
    Multi-index hashing (Norouzi et al. 2012).
    """
    codes = np.ascontiguousarray(unique).view(np.uint8).reshape(-1, HASH_BITS // 8)
    index = faiss.IndexBinaryMultiHash(HASH_BITS, BANDS, HASH_BITS // BANDS)
    index.nflip = 1
    index.add(codes)
    counts, numbers = [np.zeros(1, np.int64)], [np.empty(0, np.int64)]
    blocks = range(0, len(codes), QUERIES)
    for start in tqdm(blocks, desc="search near-duplicates", unit="block", delay=1):
        # below this radius, so one more
        found = index.range_search(codes[start : start + QUERIES], MAX_DISTANCE + 1)
        counts.append(np.diff(found[0].astype(np.int64)))
        numbers.append(found[2])
    return np.cumsum(np.concatenate(counts)), np.concatenate(numbers)
