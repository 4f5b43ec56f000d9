"""Retrieval between images and texts: recall at k, both ways."""

import numpy as np


def recalls(image_BE, text_BE, tokens_BT, ks):
    """{'image_to_text@k', 'text_to_image@k' and their mean 'recall@k'} for every k of `ks`.

    Embeddings are L2-normalised; a caption that reads the same as the right one is right too.
    """
    _, text_B = np.unique(tokens_BT, axis=0, return_inverse=True)
    metrics = {}
    for k in ks:
        way = [recall(x, y, text_B.reshape(-1), k)
               for x, y in ((image_BE, text_BE), (text_BE, image_BE))]
        metrics |= {f"image_to_text@{k}": way[0], f"text_to_image@{k}": way[1],
                    f"recall@{k}": sum(way) / 2}
    return metrics


def recall(query_BE, key_BE, text_B, k, block=2048):
    """Fraction of queries with a right key (the same text) among their k most similar ones."""
    hits = 0
    for i in range(0, len(query_BE), block):
        near = np.argpartition(-query_BE[i:i + block] @ key_BE.T, min(k, len(key_BE)) - 1)[:, :k]
        hits += (text_B[near] == text_B[i:i + block, None]).any(1).sum()
    return float(hits / len(query_BE))
