"""The record of a run: what every stage found, on disk after each of them."""

from __future__ import annotations

import datetime
import time
from pathlib import Path
from typing import Any

from gpucheck import schema
from gpucheck.stage import write_json

__all__ = ["Record", "Unwritable"]


class Unwritable(Exception):
    """The results cannot be written where they were asked for; a sentence."""


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


class Record:
    """``gpu_check.json``, rewritten whole after each stage."""

    def __init__(self, folder: Path, dry: bool) -> None:
        self.path = folder / "gpu_check.json"
        self.markdown = folder / "gpu_check.md"
        self.log = folder / "gpu_check.log"
        # Where the stage at work leaves what it has: after a kill, all that is left of it.
        self.partial = folder / "gpu_check.partial.json"
        self._began = time.time()
        self.data: dict[str, Any] = {
            "format": "normnorm-gpu-check",
            "version": schema.VERSION,
            "dry": dry,
            "started": _now(),
            "finished": None,
            "seconds": 0.0,
            "ok": None,
            "stages": {},
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.partial.unlink(missing_ok=True)
            self.log.write_text("", encoding="utf-8")
            write_json(self.path, self.data)
        except OSError as error:
            raise Unwritable(
                f"the results cannot be written into {folder}: {error.strerror or error}; "
                "name another folder with RESULTS="
            ) from None

    @property
    def stages(self) -> dict[str, Any]:
        return self.data["stages"]

    def add(self, name: str, section: dict[str, Any]) -> None:
        """Takes in a stage's section; one of a wrong shape fails, and is kept."""
        if section["data"] is not None:
            wrong = list(schema.problems(section["data"], schema.DATA[name], name))
            if wrong and section["status"] != "failed":
                section = {**section, "status": "failed"}
            if wrong:
                also = f"its data has not the shape that was agreed: {'; '.join(wrong[:3])}"
                section["message"] = "; ".join(filter(None, (section["message"], also)))
        self.stages[name] = section
        self.data["seconds"] = round(time.time() - self._began, 1)
        self._save()

    def finish(self) -> bool:
        """Closes the record: whether no stage failed and every file could be written."""
        self.data["finished"] = _now()
        failed = [s for s in self.stages.values() if s["status"] == "failed"]
        self.data["ok"] = bool(self.stages) and not failed
        self.data["seconds"] = round(time.time() - self._began, 1)
        wrong = list(schema.problems(self.data, schema.RECORD))
        if wrong:
            print(f"the record has not the shape that was agreed: {'; '.join(wrong[:3])}")
            self.data["ok"] = False
        written = self._save()
        return bool(self.data["ok"]) and written

    def _save(self) -> bool:
        try:
            write_json(self.path, self.data)
        except OSError as error:
            # What was measured is worth more than a file of it: it goes on, and says so.
            print(f"the record could not be written to {self.path}: {error}", flush=True)
            return False
        return True
