"""Judges of your own: a language model that writes verdicts, or a reward model that scores answers. From a folder or the hub."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orpo.errors import UserError
from orpo.evaluate.cache import Cache
from orpo.evaluate.judging.judges import Conversation, Done, Reply
from orpo.models.fingerprint import content_key

if TYPE_CHECKING:
    import torch

    from orpo.data.types import Text


class LocalJudge:
    """A language model that writes verdicts, greedily.

    Args:
        name: folder, hub id or alias.
        revision: of a hub model.
        device: None for the best one.
        compute_dtype: None for the weights' own.
        batch_size: questions at a time.
    """

    def __init__(
        self,
        name: str,
        *,
        revision: str | None = None,
        device: str | None = None,
        compute_dtype: torch.dtype | None = None,
        batch_size: int = 8,
    ) -> None:
        from orpo.data.template import TemplateEncoder
        from orpo.models.fingerprint import weights_sha256
        from orpo.models.load import load_model

        self.model, self.tokenizer, _ = load_model(name, revision=revision, device=device)
        self.encoder = TemplateEncoder(self.tokenizer)
        self.compute_dtype, self.batch_size = compute_dtype, batch_size
        self.identity: dict[str, Any] = {
            "kind": "local",
            "weights": weights_sha256(self.model),
            "template": self.encoder.describe().get("template_sha256"),
            "dtype": str(compute_dtype),
        }

    def ask(self, conversations: Sequence[Conversation], max_tokens: int, done: Done) -> None:
        """Generate verdicts batch by batch; see `orpo.evaluate.judging.judges.Judge`. A question too long for the model has no reply."""
        from orpo.inference.generate import TOO_LONG, Answer, generate

        def each(number: int, answer: Answer) -> None:
            done(number, None if answer.finish == TOO_LONG else Reply(answer.text))

        generate(
            self.model,
            self.tokenizer,
            self.encoder,
            conversations,
            max_new_tokens=max_tokens,
            batch_size=self.batch_size,
            compute_dtype=self.compute_dtype,
            each=each,
        )


class RewardModel:
    """A sequence classifier with one output: the higher, the better the answer.

    Args:
        name: folder or hub id.
        revision: of a hub model.
        device: None for the best one.

    Raises:
        UserError: it cannot be loaded, or has not exactly one output.
    """

    def __init__(self, name: str, *, revision: str | None = None, device: str | None = None) -> None:
        from transformers import AutoModelForSequenceClassification

        from orpo.models.fingerprint import weights_sha256
        from orpo.models.tokenizer import read_tokenizer
        from orpo.system.machine import choose_device

        options = {"revision": revision} if revision else {}
        try:
            self.tokenizer, _ = read_tokenizer(name, **options)
            self.model = AutoModelForSequenceClassification.from_pretrained(name, use_safetensors=True, **options)
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            raise UserError(f"the reward model cannot be loaded: {error}", where=f"judge {name}", expected="a folder or hub id") from error
        if self.model.config.num_labels != 1:
            raise UserError(
                f"has {self.model.config.num_labels} outputs",
                where=f"judge {name}",
                expected="a reward model: a sequence classifier with one output",
            )
        self.model.to(choose_device(device)).eval()
        self.identity: dict[str, Any] = {"kind": "reward", "weights": weights_sha256(self.model)}

    def scores(self, pairs: Sequence[tuple[Text, str]], cache: Cache, *, progress: Callable[[int, int], None] | None = None) -> list[float]:
        """The reward of each (prompt, answer), many at a time where that gives the model's own scores (`rewards.py`)."""
        import torch

        from orpo.evaluate.judging.rewards import batches, choose_way

        conversations = [as_messages(prompt) for prompt, _ in pairs]
        keys = [
            content_key(judge=self.identity, messages=messages, answer=answer)
            for messages, (_, answer) in zip(conversations, pairs, strict=True)
        ]
        todo = list({key: place for place, key in reversed(list(enumerate(keys))) if key not in cache}.values())[::-1]
        texts = [self._inputs(conversations[place], pairs[place][1]) for place in todo]
        num_done = len(pairs) - len(todo)
        with torch.no_grad():
            way = choose_way(self.model, texts)
            for batch in batches(texts):
                for number, score in zip(batch, way(self.model, [texts[number] for number in batch]), strict=True):
                    cache.put(keys[todo[number]], score)
                num_done += len(batch)
                if progress is not None:
                    progress(num_done, len(pairs))
        return [float(cache.get(key)) for key in keys]

    def _inputs(self, messages: list[dict[str, Any]], answer: str) -> dict[str, torch.Tensor]:
        """Through the chat template where there is one; else as a pair of texts, as older reward models take it."""
        import inspect

        if getattr(self.tokenizer, "chat_template", None):
            conversation = [*messages, {"role": "assistant", "content": answer}]
            encoded = self.tokenizer.apply_chat_template(conversation, tokenize=True, return_dict=True, return_tensors="pt")
        else:
            prompt = "\n\n".join(str(message["content"]) for message in messages)
            encoded = self.tokenizer(prompt, answer, return_tensors="pt", truncation=True)
        taken = inspect.signature(self.model.forward).parameters  # an encoder's token_type_ids tell prompt and answer apart
        device = next(self.model.parameters()).device
        return {name: tensor.to(device) for name, tensor in encoded.items() if name in taken}


def as_messages(prompt: Text) -> list[dict[str, Any]]:
    """A prompt as messages; plain text is what a user says."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(message) for message in prompt]


def is_reward_model(name: str) -> bool:
    """Whether a folder's configuration names a sequence classifier; a hub model's is fetched."""
    from transformers import AutoConfig

    from orpo.models.bundled import BUNDLED_ALIAS

    path = Path(name).expanduser()
    if name.lower() == BUNDLED_ALIAS or path.is_file() or (path.is_dir() and not (path / "config.json").is_file()):
        return False
    try:
        config = AutoConfig.from_pretrained(str(path) if path.is_dir() else name)
    except (OSError, ValueError) as error:
        raise UserError(f"the judge cannot be loaded: {error}", where=f"judge {name}", expected="a folder or hub id") from error
    return any(str(architecture).endswith("ForSequenceClassification") for architecture in config.architectures or ())
