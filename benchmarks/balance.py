"""How long ranks wait for each other: the packer's steps over real lengths, for up to 512 ranks, without a model.

    python benchmarks/balance.py ROWS.jsonl [ROWS.jsonl …] [--rows_per_rank 8] [--max_tokens 16384] [--max_length 2048]

Ranks meet after every micro-batch (FSDP2) or once a step (DDP). What is shown is useful work: mean tokens of a rank over those of the
slowest, which everybody waits for. Lengths are drawn with replacement from the files' own, so that there are rows for 512 ranks.
"""

from __future__ import annotations

import argparse
import json

import numpy as np

from orpo.engine.packing import pack

RANKS = (8, 64, 512)
NUM_STEPS = 10


def lengths(path: str, max_length: int) -> np.ndarray:
    """Packed tokens of every row that training on the file would take, with SmolLM2's tokenizer."""
    from orpo.data.dataset import prepare_groups
    from orpo.run.config import resolve
    from orpo.run.data import load_encoder, open_run_rows

    config = resolve(None, ["--dataset_name", path, "--model_name_or_path", "smollm2-135m-instruct", "--max_length", str(max_length)])
    groups, _ = prepare_groups(list(open_run_rows(config).train), load_encoder(config))
    return np.array([group.num_tokens for group in groups])


def useful(sizes: list[int], num_ranks: int, max_rows: int, max_tokens: int) -> tuple[float, float]:
    """(share of useful work where ranks meet after every micro-batch, where they meet once) of one step."""
    bins = pack(sizes, num_ranks=num_ranks, max_rows=max_rows, max_tokens=max_tokens)
    loads = np.array([sum(sizes[item] for item in content) for content in bins]).reshape(-1, num_ranks)
    mean = loads.sum() / num_ranks
    return mean / loads.max(axis=1).sum(), mean / loads.sum(axis=0).max()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("rows", nargs="+")
    parser.add_argument("--rows_per_rank", type=int, default=8)
    parser.add_argument("--max_tokens", type=int, default=16_384)
    parser.add_argument("--max_length", type=int, default=2048)
    given = parser.parse_args()
    source = np.random.default_rng(0)
    for path in given.rows:
        own = lengths(path, given.max_length)
        spread = {f"p{share}": int(np.percentile(own, share)) for share in (5, 50, 95, 99)}
        print(json.dumps({"rows": path, "num_rows": len(own), "mean": round(float(own.mean()), 1), "max": int(own.max()), **spread}))
        for num_ranks in RANKS:
            drawn = [source.choice(own, given.rows_per_rank * num_ranks).tolist() for _ in range(NUM_STEPS)]
            found = np.array([useful(sizes, num_ranks, given.rows_per_rank, given.max_tokens) for sizes in drawn])
            plain = [np.array(sizes).reshape(num_ranks, -1).sum(1) for sizes in drawn]
            unpacked = float(np.mean([loads.mean() / loads.max() for loads in plain]))
            shares = {"every_microbatch": found[:, 0].mean(), "once_a_step": found[:, 1].mean(), "in_order": unpacked}
            print(json.dumps({"ranks": num_ranks, **{name: round(float(share), 4) for name, share in shares.items()}}))


if __name__ == "__main__":
    main()
