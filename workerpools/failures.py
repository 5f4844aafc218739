"""What a failure of a connection is described with."""

from workerpools._run.failure import Failure, FailureKind, Phase, Sent

__all__ = ["Failure", "FailureKind", "Phase", "Sent"]
