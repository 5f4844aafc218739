"""The session that an attempt lends to its body."""

from __future__ import annotations

from typing import Any

from sqlalchemy.orm import Session, SessionTransaction

from workerpools.errors import NoAttemptError

__all__ = ["BodysSession"]


class BodysSession(Session):
    """A session that an attempt commits or rolls back, and that is of no use once the attempt is over."""

    #: The task's class, and the attribute.
    lent_as: tuple[type, str]
    #: Whether the attempt is over.
    over = False

    def begin(self, nested: bool = False) -> SessionTransaction:
        self._refuse_if_over()
        return super().begin(nested)

    def get_bind(self, *arguments: Any, **options: Any) -> Any:
        # Asked for whenever the database is to be used.
        self._refuse_if_over()
        return super().get_bind(*arguments, **options)

    def _refuse_if_over(self) -> None:
        # Session(close_resets_only=False) would forbid a body to close its session and go on, too.
        if self.over:
            self.close()
            raise NoAttemptError(
                f"{self.lent_as[0].__name__}.{self.lent_as[1]}: the run of the task body that this session belonged to "
                "is over, and nobody would commit what it does. Return data from a body, not its session; elsewhere "
                "make a session of your own: sqlalchemy.orm.Session(engine)"
            )

    def finish(self) -> bool:
        """Commit for the attempt. Whatever is done with a session begins its transaction: else there is nothing."""
        if not self.in_transaction():
            return False
        self.commit()
        return True

    def end(self) -> None:
        """Close for the attempt, for good."""
        try:
            self.close()
        finally:
            self.over = True
