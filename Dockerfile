# One image for everything of ours in docker-compose.yml: the worker, Flower, the submitter and the HTTP upstream.

FROM python:3.13-slim AS build
WORKDIR /src
RUN python -m venv /venv
COPY pyproject.toml README.md LICENSE ./
COPY workerpools workerpools
COPY demo_tasks demo_tasks
# The first pip that knows dependency groups.
RUN /venv/bin/pip install --no-cache-dir --disable-pip-version-check "pip>=25.1"
# A regular install, not an editable one: the environment is all that the next stage takes over.
RUN /venv/bin/pip install --no-cache-dir --disable-pip-version-check ".[all]" --group demo-app

FROM python:3.13-slim
# A number of its own, so that a container's files and processes cannot be mistaken for a user's of the host.
RUN groupadd --gid 10001 app \
    && useradd --uid 10001 --gid app --create-home --home-dir /app --shell /usr/sbin/nologin app
COPY --from=build /venv /venv
# The demo is no part of the distribution: it runs from here, the working directory.
COPY --from=build /src/demo_tasks /app/demo_tasks
ENV PATH=/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
WORKDIR /app
USER 10001:10001
CMD ["celery", "-A", "demo_tasks.app", "worker", "--pool", "prefork", "--concurrency", "4", "-E", "--loglevel", "INFO"]
