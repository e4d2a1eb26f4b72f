"""Sections of the configuration that this version reads and cannot run."""

UNSUPPORTED = {"lora": "lora: training adapters is not supported by this version; remove the section"}
