"""`orpo audit --cross_fit`: it trains several models, and says how far it is."""

from __future__ import annotations

import json
import re

from orpo.cli import main


def test_cross_fitting_says_how_far_it_is(tmp_path, tiny_model_factory, tiny_tokenizer_factory, capsys):
    tokenizer = tiny_tokenizer_factory()
    tiny_model_factory("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"Question {n}?", "chosen": f"An answer, {n}.", "rejected": f"Words on {n}."} for n in range(54)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    capsys.readouterr()
    assert main(["audit", str(tmp_path / "rows.jsonl"), "--model", str(tmp_path / "model"), "--cross_fit", "2", "--json"]) == 0
    shown = capsys.readouterr()
    # Two folds of 27: two epochs of the others, then the fold itself.
    total = 2 * (2 * 27 + 27)
    assert re.search(rf"working      rows of 2 folds, trained on and scored: \d+ of {total}", shown.err)
    assert f"done         rows of 2 folds, trained on and scored: {total}" in shown.err
    (surprise,) = json.loads(shown.out)["model"]
    assert surprise["method"] == "cross-fitted, 2 folds"
    assert "Cross-fitting" not in surprise["sentence"]  # which has been done
