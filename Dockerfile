# Two images: the operator (--target operator) and the payload (--target trainer).
# What changes most comes last: a change of our code is a layer of a megabyte, a change of torch's
# version one of five gigabytes. Bytecode is compiled with unchecked hashes, because the root file
# system is read-only and builders disagree about the times of copied files.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS base
# A user without a name breaks getpass. Written to is the volume at /scratch (trainer) or /tmp alone.
RUN find / -xdev -type f -perm /6000 -exec chmod a-s {} + \
 && echo 'btx:x:65532:65532::/scratch:/usr/sbin/nologin' >> /etc/passwd \
 && echo 'btx:x:65532:' >> /etc/group \
 && install -d -m 0755 -o 65532 -g 65532 /scratch \
 && python3 -m compileall -q -j 0 --invalidation-mode unchecked-hash \
      "$(python3 -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')" \
 && python3 -m venv --without-pip /opt/btx
ENV PATH=/opt/btx/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    PYTHONPATH=/opt/btx/app PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp

# Exact lists, so that a layer is made again only when one of its own packages changes.
FROM base AS pins
# Certificate authorities of a network with its own; mount the file into the build.
ARG SSL_CERT_FILE
COPY pyproject.toml constraints.txt /pins/
WORKDIR /pins
RUN python3 -m venv /tools \
 && /tools/bin/pip install --quiet --no-cache-dir ${SSL_CERT_FILE:+--cert "$SSL_CERT_FILE"} \
      --constraint constraints.txt uv \
 && install -D /tools/bin/uv /uv/uv
RUN list() { /uv/uv pip compile --quiet --no-cache --no-header --no-annotate \
      --constraint constraints.txt "$@"; } \
 && echo torch | list --output-file torch.txt - \
 && list --extra trainer --output-file trainer.txt pyproject.toml \
 && list --extra operator --output-file operator.txt pyproject.toml \
 && ! grep -hvxF -f constraints.txt torch.txt trainer.txt operator.txt \
 && python3 -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
      print("Metadata-Version: 2.1", "Name: btx", "Version: " + p["version"], sep="\n")' > METADATA \
 && touch -d @0 *

FROM base AS operator
ARG SSL_CERT_FILE
COPY --from=pins /pins/operator.txt /opt/btx/
RUN --mount=type=bind,from=pins,source=/uv,target=/mnt \
    PYC_INVALIDATION_MODE=UNCHECKED_HASH /mnt/uv pip install --quiet --no-cache --no-deps \
      --python /opt/btx/bin/python --compile-bytecode --requirement /opt/btx/operator.txt
COPY --from=pins /pins/METADATA /opt/btx/app/btx.dist-info/
COPY crds/btx_api /opt/btx/app/btx_api
COPY operator/btx_operator /opt/btx/app/btx_operator
RUN python -m compileall -q --invalidation-mode unchecked-hash /opt/btx/app
LABEL org.opencontainers.image.title="BTX operator" org.opencontainers.image.licenses="Apache-2.0"
USER 65532:65532
ENTRYPOINT ["python", "-m", "btx_operator.cluster"]

# A faster malloc for the tokenizers' processes (btx_trainer/processes.py looks for it here).
FROM base AS allocator
RUN { ls /usr/lib/*/libmimalloc.so.2 > /dev/null 2>&1 \
      || { apt-get update -qq && apt-get install -qq -y --no-install-recommends libmimalloc2.0; }; } \
 && install -D -m 0644 /usr/lib/*/libmimalloc.so.2 /allocator/libmimalloc.so.2 \
 && touch -d @0 /allocator/libmimalloc.so.2

FROM base AS trainer
ARG SSL_CERT_FILE
COPY --from=pins /pins/torch.txt /opt/btx/
RUN --mount=type=bind,from=pins,source=/uv,target=/mnt \
    PYC_INVALIDATION_MODE=UNCHECKED_HASH /mnt/uv pip install --quiet --no-cache --no-deps \
      --python /opt/btx/bin/python --compile-bytecode --requirement /opt/btx/torch.txt
COPY --from=pins /pins/trainer.txt /opt/btx/
RUN --mount=type=bind,from=pins,source=/uv,target=/mnt \
    PYC_INVALIDATION_MODE=UNCHECKED_HASH /mnt/uv pip install --quiet --no-cache --no-deps \
      --python /opt/btx/bin/python --compile-bytecode --requirement /opt/btx/trainer.txt
COPY --from=allocator /allocator/ /usr/local/lib/
ENV HOME=/scratch TMPDIR=/scratch HF_HOME=/scratch/huggingface MPLCONFIGDIR=/scratch/matplotlib \
    TRITON_CACHE_DIR=/scratch/triton TORCHINDUCTOR_CACHE_DIR=/scratch/inductor
COPY --from=pins /pins/METADATA /opt/btx/app/btx.dist-info/
COPY crds/btx_api /opt/btx/app/btx_api
COPY trainer_image/btx_trainer /opt/btx/app/btx_trainer
RUN python -m compileall -q --invalidation-mode unchecked-hash /opt/btx/app
LABEL org.opencontainers.image.title="BTX trainer" org.opencontainers.image.licenses="Apache-2.0"
WORKDIR /scratch
USER 65532:65532
ENTRYPOINT ["python", "-m", "btx_trainer"]
