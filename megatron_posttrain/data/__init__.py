"""Row -> tokens -> packed rows -> micro-batches: one module a stage, each handing the next a dataclass."""
