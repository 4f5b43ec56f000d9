"""Retrieval between images and texts: recall at k in both directions, and its chance level."""

import numpy as np


def recalls(image_BE, text_BE, caption_B2, ks):
    """{'image_to_text@k', 'text_to_image@k', their mean 'recall@k', and 'chance@k'} for k in `ks`.

    Embeddings are L2-normalised. Row i of images belongs to row i of texts. A text whose whole
    caption equals the right one is right too. caption_B2: the captions' hashes before they are cut
    into tokens (`data.caption_hash`), or any integers [B, n] that are equal for equal captions.
    'chance@k' is what a random ranking reaches. Report it beside the recall: with k of B = k pairs,
    or with one caption for all, it is 1, and a recall of 1 then means nothing.
    """
    _, caption_B = np.unique(caption_B2, axis=0, return_inverse=True)
    caption_B = caption_B.reshape(-1)
    metrics = {}
    for k in ks:
        way = [recall(x, y, caption_B, k) for x, y in ((image_BE, text_BE), (text_BE, image_BE))]
        metrics |= {f"image_to_text@{k}": way[0], f"text_to_image@{k}": way[1],
                    f"recall@{k}": sum(way) / 2, f"chance@{k}": chance(caption_B, k)}
    return metrics


def recall(query_BE, key_BE, caption_B, k, block=2048):
    """Fraction of queries with a right key, one of the same caption, among their k most similar."""
    hits = 0
    for i in range(0, len(query_BE), block):
        near = np.argpartition(-query_BE[i:i + block] @ key_BE.T, min(k, len(key_BE)) - 1)[:, :k]
        hits += (caption_B[near] == caption_B[i:i + block, None]).any(1).sum()
    return float(hits / len(query_BE))


def chance(caption_B, k):
    """Expected recall at k of a random ranking of the B keys. caption_B: int, 0 to B - 1.

    A query with m right keys misses all of them with probability C(B - m, k) / C(B, k), which is
    the product of (B - m - j) / (B - j) over j < k.
    """
    B = len(caption_B)
    m_B1 = np.bincount(caption_B)[caption_B][:, None]
    j = np.arange(min(k, B))
    return float(1 - np.maximum((B - m_B1 - j) / (B - j), 0).prod(1).mean())
