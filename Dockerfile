# syntax=docker/dockerfile:1
# wiseline with everything it imports, for KubeRay and for single machines; the tag is the version of Ray.
#   docker build --target cpu  --tag wiseline:2.60.0 --build-arg TORCH_INDEX=<PyTorch's index of CPU builds> .
#   docker build --target cuda --tag wiseline-cuda:2.60.0 .
# Bases are pinned by tag: nobody here could look their digests up. Pin yours: --build-arg PYTHON=python:…@sha256:…
ARG PYTHON=python:3.11.13-slim-bookworm

FROM ${PYTHON} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /src

# What wiseline needs, from pyproject.toml and constraints.txt alone: this layer stays while only the source changes.
FROM build AS dependencies-cpu
COPY pyproject.toml constraints.txt ./
# Torch's builds for CPUs lie in an index of PyTorch's own: name it here, or torch brings gigabytes of CUDA.
ARG TORCH_INDEX
RUN PIP_INDEX_URL="$TORCH_INDEX" pip install "$(grep '^torch==' constraints.txt)" \
 && python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" > needed.txt \
 && pip install --constraint constraints.txt --requirement needed.txt

FROM build AS dependencies-cuda
COPY pyproject.toml constraints.txt ./
# Torch from the package index brings CUDA's libraries; the driver is the node's.
RUN python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; print(*p['dependencies'], *p['optional-dependencies']['multi-gpu'], sep='\n')" > needed.txt \
 && pip install --constraint constraints.txt --requirement needed.txt

FROM dependencies-cpu AS installed-cpu
COPY . .
RUN pip install --no-deps .

FROM dependencies-cuda AS installed-cuda
COPY . .
RUN pip install --no-deps .

FROM ${PYTHON} AS runtime
# Nobody, at home in /home/wiseline. All that is written goes there or to /tmp: the rest may be read-only.
RUN groupadd --gid 10001 wiseline && useradd --uid 10001 --gid wiseline --create-home wiseline \
 # KubeRay starts Ray from a login shell, which forgets PATH.
 && for name in ray serve wiseline; do ln -s /opt/venv/bin/$name /usr/local/bin/$name; done
ENV PATH=/opt/venv/bin:$PATH HOME=/home/wiseline PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0
COPY demo /opt/wiseline/demo
COPY ray_config.yaml /opt/wiseline/
USER 10001:10001
WORKDIR /opt/wiseline
EXPOSE 8000 8265
CMD ["wiseline", "--help"]

FROM runtime AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=installed-cuda /opt/venv /opt/venv

# Last, so that it is what `docker build .` makes.
FROM runtime AS cpu
COPY --from=installed-cpu /opt/venv /opt/venv
