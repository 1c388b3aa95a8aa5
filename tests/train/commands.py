"""What tests of commands share: files of records, and a command line that is refused."""

import json
from pathlib import Path

import pytest

from hdpo_train.cli.main import main


def write(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def refused(argv: list[str], capsys) -> str:
    """The message."""
    with pytest.raises(SystemExit) as exit:
        main(argv)
    assert exit.value.code == 2
    return capsys.readouterr().err
