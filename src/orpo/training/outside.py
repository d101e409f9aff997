"""The outside world that a run may talk to, trackers and the hub: it never stops a run, and it gets nothing but what it is meant to get.

transformers lets an error of a tracker or of the hub end the training, and uploads the run's whole folder (metrics, reports, arguments as
a pickle). Here the first error of each is a warning, and an upload is weights, tokenizer and card.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.trainer_callback import CallbackHandler

from orpo.models.hub import UPLOADED

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from transformers import Trainer as _Base
else:
    _Base = object

logger = logging.getLogger(__name__)

_INTEGRATIONS = "transformers.integrations"


class TolerantCallbackHandler(CallbackHandler):
    """Calls callbacks as transformers does; a tracker of `transformers.integrations` that raises is dropped with one warning."""

    callbacks: list[Any]

    @classmethod
    def of(cls, handler: CallbackHandler) -> TolerantCallbackHandler:
        """The same handler, tolerant."""
        tolerant = cls.__new__(cls)
        tolerant.__dict__.update(handler.__dict__)
        return tolerant

    def call_event(self, event: str, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        for callback in list(self.callbacks):
            # A handler of its own for each, because a callback may set off events that all of them must see.
            alone = CallbackHandler.__new__(CallbackHandler)
            alone.__dict__.update(self.__dict__, callbacks=[callback])
            try:
                control = alone.call_event(event, args, state, control, **kwargs)
            except Exception as error:
                if not type(callback).__module__.startswith(_INTEGRATIONS):
                    raise
                self.callbacks.remove(callback)
                logger.warning(
                    "the tracker %s failed (%s: %s); the run goes on without it, metrics.jsonl has everything",
                    *(type(callback).__name__, type(error).__name__, _first_line(error)),
                )
        return control


class OutsideMixin(_Base):
    """Trackers and uploads for `ORPOTrainer`, in front of transformers' Trainer in the order of bases."""

    callback_handler: CallbackHandler
    push_in_progress: Any = None
    _upload_folder: Path | None = None
    _is_hub_failure_told = False

    def tolerate_trackers(self) -> None:
        """Call it once, after transformers' own constructor."""
        self.callback_handler = TolerantCallbackHandler.of(self.callback_handler)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository; a hub that cannot be reached is a warning."""
        try:
            self._make_repository(token, private)
        except Exception as error:
            self.hub_model_id = self.args.hub_model_id
            self._tell_hub_failure(error)

    def _make_repository(self, token: str | None, private: bool | None) -> None:
        before = self.args.hub_private_repo
        # transformers 5.17 takes it from the arguments alone, later versions do where nothing else is said.
        self.args.hub_private_repo = before if private is None else private
        try:
            super().init_hf_repo(token=token)
        finally:
            self.args.hub_private_repo = before

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Send a checkpoint's weights in the background; skipped while the last one is under way, unless `hub_always_push`."""
        from transformers.trainer_utils import HubStrategy

        is_busy = self.push_in_progress is not None and not self.push_in_progress.done()
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END or (is_busy and not self.args.hub_always_push):
            return
        self._collect_push()
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        folder = Path(tempfile.mkdtemp(prefix=".upload-", dir=self.args.output_dir))
        try:
            # A copy of its own: retention may remove the checkpoint while it is being sent.
            shutil.copytree(checkpoint_folder, folder, dirs_exist_ok=True, copy_function=_link_or_copy)
            self.push_in_progress = self._upload(
                folder, f"Training in progress, step {self.state.global_step}", token=None, revision=None, run_as_future=True
            )
            self._upload_folder = folder
        except Exception as error:
            shutil.rmtree(folder, ignore_errors=True)
            self._tell_hub_failure(error)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **_: Any,
    ) -> CommitInfo | None:
        """Upload weights, tokenizer and the run's README.md, and wait for its end. Called by the user, it raises what the hub raises."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self._make_repository(token, private)
        folder = Path(self.args.output_dir or ".") / ".upload-model"
        self.save_model(str(folder), _internal_call=True)
        try:
            if not self.is_world_process_zero():
                return None
            card = Path(self.args.output_dir or ".") / "README.md"
            if card.is_file():
                shutil.copy(card, folder / card.name)
            self._finish_current_push()
            return self._upload(folder, commit_message or "End of training", token=token, revision=revision, run_as_future=False)
        finally:
            if self.is_world_process_zero():
                shutil.rmtree(folder, ignore_errors=True)

    def _upload(self, folder: Path, message: str, *, token: str | None, revision: str | None, run_as_future: bool) -> Any:
        from huggingface_hub import HfApi

        return HfApi().upload_folder(
            repo_id=str(self.hub_model_id),
            folder_path=folder,
            commit_message=message,
            token=token if token is not None else self.args.hub_token,
            revision=revision if revision is not None else self.args.hub_revision,
            allow_patterns=list(UPLOADED),
            run_as_future=run_as_future,
        )

    def _finish_current_push(self) -> None:
        if self.push_in_progress is not None:
            logger.info("waiting for the upload of a checkpoint to end")
            self._collect_push()

    def _collect_push(self) -> None:
        """The outcome of the last upload: nothing, or a warning."""
        push, self.push_in_progress = self.push_in_progress, None
        if push is None:
            return
        error = push.exception()  # waits for its end
        if self._upload_folder is not None:
            shutil.rmtree(self._upload_folder, ignore_errors=True)
        if error is not None:
            self._tell_hub_failure(error)

    def _tell_hub_failure(self, error: BaseException) -> None:
        if not self._is_hub_failure_told:
            self._is_hub_failure_told = True
            logger.warning("the hub failed (%s: %s); the run goes on, everything is on disk", type(error).__name__, _first_line(error))


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]


def _link_or_copy(source: str, target: str) -> None:
    try:
        Path(target).hardlink_to(source)
    except OSError:
        shutil.copy2(source, target)
