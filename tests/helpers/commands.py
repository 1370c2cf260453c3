"""The command line, called in this process."""

import json

from peft_prune.cli import main


def run(capsys, *argv, code=0):
    assert main([str(a) for a in argv]) == code
    printed = capsys.readouterr()
    return json.loads(printed.out) if "--json" in argv else printed
