"""Finetuning as it is: the method that the others are compared with."""

from __future__ import annotations

from noisytune_cli.study.methods import Method


class Plain(Method):
    """No hook at all."""

    name = "plain"


METHOD = Plain
