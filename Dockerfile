# Two images: `docker build --target cpu .` and `docker build --target gpu .` (the last one, and so the default).
# Any builder can build it: no syntax line, no mounts, no feature that only BuildKit has. See docs/deploy.md.
ARG BASE_IMAGE=python:3.11-slim-bookworm

# What runs beside Python: an init that reaps what a killed engine leaves, NUMA for the engine, and the compiler that
# Triton and torch.compile call at run time.
FROM ${BASE_IMAGE} AS base
ENV LANG=C.UTF-8 \
    PATH=/opt/tidegate/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_ROOT_USER_ACTION=ignore
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libnuma1 tini \
    && rm -rf /var/lib/apt/lists/*

# Only the list of packages is copied here: a change of our code reuses this layer.
FROM base AS cpu-packages
# For indexes of your own; pip reads them. PyTorch's CPU builds are in an index of their own.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
ARG PIP_FIND_LINKS
ARG PIP_TRUSTED_HOST
RUN python3 -m venv /opt/tidegate
COPY locks/cpu.txt /build/locks/
RUN pip install --no-deps --requirement /build/locks/cpu.txt

# The embedded model, so that a container starts without a network. `--build-arg EMBEDDED_MODEL=no` leaves it out.
# Of our code it takes the files that make the model, and no other: they seldom change.
FROM cpu-packages AS cpu-model
ARG EMBEDDED_MODEL=yes
COPY server/__init__.py /build/server/
COPY server/engine/__init__.py server/engine/embedded_model.py server/engine/start_failures.py /build/server/engine/
RUN mkdir -p /opt/tidegate-cache \
    && if [ "$EMBEDDED_MODEL" = yes ]; then \
        cd /build && XDG_CACHE_HOME=/opt/tidegate-cache \
        python3 -c 'from server.engine.embedded_model import ensure_embedded_model as make; make()'; \
    fi

# The user, the folders and the way it starts: the same in both images.
FROM base AS runtime
# VLLM_CACHE_ROOT and HF_HOME: what is worth keeping between containers. XDG_CACHE_HOME: the embedded model.
ENV HOME=/var/lib/tidegate \
    LOGNAME=tidegate \
    HF_HOME=/models/huggingface \
    TIDEGATE_DATA_FOLDER=/var/lib/tidegate \
    TIDEGATE_HOST=0.0.0.0 \
    TIDEGATE_PORT=8000 \
    TIDEGATE_SECRETS=/run/secrets \
    TRITON_CACHE_DIR=/var/cache/tidegate/triton \
    VLLM_CACHE_ROOT=/var/cache/tidegate/vllm \
    VLLM_NO_USAGE_STATS=1 \
    XDG_CACHE_HOME=/opt/tidegate-cache
RUN useradd --system --uid 10001 --user-group --home-dir /var/lib/tidegate --no-create-home tidegate \
    && install -d -o tidegate -g tidegate /var/lib/tidegate /var/cache/tidegate /models /opt/tidegate-cache \
    && install -d /run/secrets
COPY docker/healthcheck.py /usr/local/lib/tidegate/healthcheck.py
WORKDIR /var/lib/tidegate
EXPOSE 8000
# Healthy means that a chat is answered. A large model may load for many minutes before it counts.
HEALTHCHECK --interval=5s --timeout=5s --start-period=30m --retries=3 \
    CMD ["python3", "-I", "-S", "/usr/local/lib/tidegate/healthcheck.py"]
ENTRYPOINT ["tini", "--", "tidegate"]
CMD ["serve"]

FROM runtime AS cpu
COPY --from=cpu-packages /opt/tidegate /opt/tidegate
COPY --from=cpu-model --chown=10001:10001 /opt/tidegate-cache /opt/tidegate-cache
COPY pyproject.toml LICENSE README.md /build/
COPY server /build/server
RUN pip install --no-deps --no-build-isolation /build
USER 10001:10001

# vLLM's CUDA build. The driver comes from the machine, through NVIDIA's container runtime.
# Without our code, this installs what pyproject.toml names: many GB that a change of our code shall not load again.
FROM base AS gpu-packages
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
ARG PIP_TRUSTED_HOST
RUN python3 -m venv /opt/tidegate
COPY pyproject.toml LICENSE README.md /build/
RUN pip install '/build[gpu]'

FROM runtime AS gpu
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=gpu-packages /opt/tidegate /opt/tidegate
COPY pyproject.toml LICENSE README.md /build/
COPY server /build/server
RUN pip install --no-deps --no-build-isolation --force-reinstall /build
USER 10001:10001
