"""Where a model is, whether it can be used, and what went wrong if it cannot."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from orpo.errors import UserError
from orpo.models.bundled import BUNDLED_ALIAS, bundled_model_folder
from orpo.system.machine import hub_answers
from orpo.system.parts import has_weights_in_parts

Kind = Literal["alias", "hub", "folder", "adapter", "gguf"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
_NOT_A_LANGUAGE_MODEL = ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice")

# Wrong input shows as one of these; anything else (AttributeError, AssertionError, …) is a bug and keeps its traceback.
_INPUT_ERRORS = (OSError, ValueError, LookupError, RuntimeError, ImportError, TypeError, MemoryError)


@dataclass(frozen=True, slots=True)
class ModelSource:
    """What a model's name turned out to be.

    Attributes:
        name: as the user wrote it.
        kind: "alias" and "folder" are whole models in a folder; "adapter" is a PEFT adapter's folder.
        location: a hub id, or a path.
    """

    name: str
    kind: Kind
    location: str

    @property
    def is_local(self) -> bool:
        return self.kind != "hub"


def find_source(name: str) -> ModelSource:
    """Tell an alias, a folder, a GGUF file and a hub id apart, in this order.

    The folder of a run stands for the model or adapter in it.

    Raises:
        UserError: a path that leads nowhere or to something that is not a model, or no possible name.
    """
    if name.lower() == BUNDLED_ALIAS:
        return ModelSource(BUNDLED_ALIAS, "alias", str(bundled_model_folder()))
    path = Path(name).expanduser()
    if path.is_dir():
        return _folder_source(name, path)
    if path.is_file():
        if path.suffix == ".gguf":
            return ModelSource(name, "gguf", str(path))
        raise UserError(
            "this file is not a model",
            where=name,
            expected="a model's folder, a .gguf file, a hub id or " + BUNDLED_ALIAS,
            mend=f"name the folder: {path.parent}" if path.suffix in (".safetensors", ".json", *_PICKLES) else None,
        )
    if _looks_like_path(name):
        raise UserError("there is no such folder or file", where=name, mend=_nearest_path(path))
    if not _HUB_ID.fullmatch(name):
        raise UserError(
            f"{name!r} is neither a folder nor a possible hub id",
            where="model_name_or_path",
            expected="a folder, a .gguf file, a hub id such as HuggingFaceTB/SmolLM2-135M, or " + BUNDLED_ALIAS,
        )
    return ModelSource(name, "hub", name)


def _folder_source(name: str, folder: Path) -> ModelSource:
    if (folder / "run.json").is_file() and not (folder / "config.json").is_file():
        inner = next((folder / part for part in ("model", "adapter") if (folder / part).is_dir()), None)
        if inner is None:
            raise UserError(
                "this run has no final weights yet",
                where=name,
                mend="run its training to the end, or name one of its checkpoint folders",
            )
        folder = inner
    is_adapter = (folder / "adapter_config.json").is_file()
    return ModelSource(name, "adapter" if is_adapter else "folder", str(folder))


def _looks_like_path(name: str) -> bool:
    is_marked = name.startswith((".", "/", "~")) or "\\" in name or name.endswith("/") or name.count("/") > 1
    return is_marked or Path(name).suffix in (".gguf", ".safetensors", *_PICKLES)


def _nearest_path(path: Path) -> str | None:
    try:
        beside = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return None
    near = difflib.get_close_matches(path.name, beside, n=1)
    return f"did you mean {path.parent / near[0]}?" if near else None


def read_config(source: ModelSource) -> dict[str, Any]:
    """The folder's config.json.

    Raises:
        UserError: it is not there, or is not a JSON object.
    """
    path = Path(source.location) / "config.json"
    if not path.is_file():
        raise UserError(
            "this folder is not a model: it has no config.json",
            where=source.location,
            expected="config.json, the weights as .safetensors, and the tokenizer's files, as save_pretrained writes them",
            mend=_inner_model(Path(source.location)),
        )
    config = read_json(path)
    if not isinstance(config, dict):
        raise UserError("a model's configuration must be a JSON object", where=str(path))
    return config


def _inner_model(folder: Path) -> str | None:
    inner = sorted(entry.parent for entry in folder.glob("*/config.json"))
    return f"did you mean {inner[-1]}?" if inner else None


def check_folder(source: ModelSource) -> None:
    """A configuration and weights as safetensors, all inside the folder. Pickles are refused: loading one can run any code.

    Raises:
        UserError: one of them is missing, or the index of the weights names a file elsewhere.
    """
    read_config(source)
    folder = Path(source.location)
    if has_weights_in_parts(folder):
        return
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES and path.stem != "training_args")
        if pickles:
            raise UserError(
                f"the weights are there only as a pickle ({pickles[0]}), which can run code when it is opened",
                where=source.location,
                expected="safetensors",
                mend="convert them where you trust their origin: load them with transformers and call save_pretrained",
            )
        raise UserError("there are no weights in this folder", where=source.location, expected="*.safetensors beside config.json")
    index = folder / "model.safetensors.index.json"
    if index.is_file() and not (folder / "model.safetensors").is_file():
        _check_index(index, {path.name for path in weights})


def check_tokenizer_files(source: ModelSource) -> None:
    """At least one of the files that a tokenizer can be built from.

    Raises:
        UserError: there is none.
    """
    folder = Path(source.location)
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise UserError(
            "there is no tokenizer in this folder",
            where=source.location,
            expected="tokenizer.json or its like, beside the model",
            mend="save it there with tokenizer.save_pretrained(folder); a base model's checkpoint often lacks it",
        )


def _check_index(index: Path, present: set[str]) -> None:
    content = read_json(index)
    names = set(content["weight_map"].values()) if isinstance(content, dict) and isinstance(content.get("weight_map"), dict) else None
    if not names or not all(isinstance(name, str) for name in names):
        raise UserError("this is not an index of weights", where=str(index), expected='{"weight_map": {"tensor": "file", …}}')
    outside = sorted(name for name in names if PurePosixPath(name).name != name or "\\" in name)
    if outside:
        raise UserError(f"the index names a file outside of the folder: {outside[0]!r}", where=str(index))
    if absent := sorted(names - present):
        raise UserError(f"{len(absent)} of {len(names)} weight files are missing, {absent[0]} first", where=str(index.parent))


def check_config(config: Any, source: ModelSource) -> None:
    """Only models that continue a text, token by token, have the probabilities that ORPO trains.

    Raises:
        UserError: an encoder-decoder model, an encoder, or a model with another head.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    expected = "a causal (decoder-only) language model"
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"{config.model_type} is an encoder-decoder model",
            where=source.name,
            expected=expected,
            mend="prompt and answer must be one sequence here: the prompt's tokens count in the loss and are shared between the answers",
        )
    architectures = list(getattr(config, "architectures", None) or [])
    if architectures and all(name.endswith(_NOT_A_LANGUAGE_MODEL) for name in architectures):
        raise UserError(f"{architectures[0]} does not continue a text", where=source.name, expected=expected)
    has_own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not has_own_code:
        raise UserError(f"transformers has no causal language model of type {config.model_type!r}", where=source.name, expected=expected)


def weight_files(source: ModelSource, hub: Mapping[str, Any]) -> list[Path]:
    """The safetensors files of a folder or of the hub, fetched where they are not here yet; none where it has only others.

    Args:
        hub: transformers' arguments about revision and network.
    """
    from transformers.utils.hub import cached_file

    if source.is_local:
        return sorted(Path(source.location).glob("*.safetensors"))
    wanted = {name: hub[name] for name in ("revision", "local_files_only") if name in hub}

    def fetched(name: str) -> list[Path]:
        path = cached_file(source.location, name, **wanted, _raise_exceptions_for_missing_entries=False)
        return [Path(path)] if isinstance(path, str) else []

    if index := fetched("model.safetensors.index.json"):
        return [path for name in sorted(set(read_json(index[0])["weight_map"].values())) for path in fetched(name)]
    return fetched("model.safetensors")


def hub_commit(source: ModelSource, revision: str | None) -> str | None:
    """The commit that a branch or tag of the hub stands for in the cache, after its files were read from there."""
    from transformers.utils.hub import cached_file, extract_commit_hash

    found = cached_file(
        source.location, "config.json", revision=revision, local_files_only=True, _raise_exceptions_for_missing_entries=False
    )
    return extract_commit_hash(found, None) if isinstance(found, str) else None


def fetch_hub_adapter(source: ModelSource, revision: str | None) -> Path | None:
    """A local copy of a hub repository that holds a PEFT adapter and no model of its own; None for every other one."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        hf_hub_download(source.location, "config.json", revision=revision, local_files_only=not hub_answers())
        return None
    except LocalEntryNotFoundError:
        return None
    except EntryNotFoundError:
        pass
    except (OSError, ValueError):  # no such repository, no leave, no network: loading meets the same and explains it
        return None
    wanted = ["adapter_config.json", "adapter_model.safetensors", "*token*", "*.jinja", "*.model", "vocab*", "merges.txt"]
    folder = Path(snapshot_download(source.location, revision=revision, allow_patterns=wanted))
    return folder if (folder / "adapter_config.json").is_file() else None


def explain_failure(error: Exception, source: ModelSource, *, part: str = "model") -> Exception:
    """The UserError to raise in place of what a library raised on bad input; bugs come back as they are."""
    from safetensors import SafetensorError

    if isinstance(error, UserError):
        return error
    if isinstance(error, SafetensorError):
        return UserError(f"a weight file is damaged: {error}", where=source.location, mend="copy or download the model again")
    if not isinstance(error, _INPUT_ERRORS) and "huggingface_hub" not in type(error).__module__:
        return error
    text = str(error).strip() or type(error).__name__
    if "trust_remote_code" in text:
        return UserError(
            f"the {part} comes with Python code of its own",
            where=source.name,
            mend="read that code, then set trust_remote_code: true and model_revision to the commit that you read",
        )
    if isinstance(error, MemoryError) or "out of memory" in text.lower():
        return UserError(
            f"there is not enough memory to load the model: {_first_line(text)}",
            where=source.name,
            mend="set dtype: bfloat16 and use_peft: true, or load_in_4bit: true on a GPU, or take a smaller model",
        )
    if "ignore_mismatched_sizes" in text:
        return UserError("the weights have other shapes than config.json says (the report above names them)", where=source.location)
    if source.kind == "hub":
        return _explain_hub(error, text, source, part)
    return UserError(f"the {part} cannot be loaded: {_first_line(text)}", where=source.location)


def _explain_hub(error: Exception, text: str, source: ModelSource, part: str) -> UserError:
    name, causes = source.name, {type(cause).__name__ for cause in _chain(error)}
    alias = difflib.get_close_matches(name.lower(), [BUNDLED_ALIAS], cutoff=0.6)
    mend = f"did you mean the bundled {BUNDLED_ALIAS}?" if alias else None
    if "GatedRepoError" in causes:
        return UserError("only those who asked its owner may load it", where=name, mend="ask on its page, then run `hf auth login`")
    if "RevisionNotFoundError" in causes:
        return UserError("the hub has no such revision of it", where=name, mend="its page lists commits and tags")
    if "RepositoryNotFoundError" in causes:
        return UserError("neither a folder here nor a model on the hub", where=name, mend=mend or "check the name; log in if it is private")
    if causes & {"OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectionError", "ConnectError", "ConnectTimeout", "ReadTimeout"}:
        return UserError(
            "no such folder here, and the hub cannot be reached (nor is the model in its local cache)",
            where=source.name,
            mend=mend or f"check the name and the network, or use what is here: a folder, a .gguf file, {BUNDLED_ALIAS}",
        )
    if "safetensors" in text and "does not appear to have" in text:
        return UserError("the hub has its weights only as pickles, which are never opened here", where=source.name, expected="safetensors")
    return UserError(f"the {part} cannot be loaded: {_first_line(text)}", where=source.name, mend=mend)


def _chain(error: BaseException | None) -> list[BaseException]:
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def _first_line(text: str) -> str:
    return text.split("\n", 1)[0][:300]


def read_json(path: Path) -> Any:
    """A JSON file's value.

    Raises:
        UserError: it cannot be read or is not JSON; names the file.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot be read as JSON: {error}", where=str(path)) from error


def refuse_random_weights(loading: Mapping[str, Any], source: ModelSource) -> None:
    """transformers fills missing tensors with random numbers and goes on; a run would then train noise.

    Raises:
        UserError: `loading`, as transformers reports it, says that some are missing.
    """
    missing = sorted(loading.get("missing_keys") or ())
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(
            f"weights are missing: {', '.join(missing[:3])}{more}",
            where=source.location,
            expected="every weight of the architecture in the safetensors files",
            mend="copy or download the model again; if it was saved for another task (a classifier), use its language model",
        )
