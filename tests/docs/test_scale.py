"""The job for Kubernetes in docs/scale.md: an index fails at once for those codes that would come again."""

from __future__ import annotations

import yaml
from pages import blocks

from noisytune_cli.commands.engines import PASSING
from noisytune_cli.errors import NoisytuneError


def test_the_codes_that_fail_an_index_are_those_that_stay() -> None:
    (text,) = [block.text for block in blocks("scale.md") if block.language == "yaml"]
    spec = yaml.safe_load(text)["spec"]
    (rule,) = [rule for rule in spec["podFailurePolicy"]["rules"] if rule["action"] == "FailIndex"]
    every = {NoisytuneError.exit_code, *(kind.exit_code for kind in NoisytuneError.__subclasses__())}
    assert set(rule["onExitCodes"]["values"]) == every - set(PASSING)
    (container,) = spec["template"]["spec"]["containers"]
    (variable,) = container["env"]
    assert (variable["name"], int(variable["value"])) == ("JOB_COMPLETIONS", spec["completions"])
