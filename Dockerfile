# docker build --tag backdoorscan .
# docker run --rm --network none --volume "$PWD:/work:ro" backdoorscan scan models --valid clean.npz
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
RUN python -m venv /opt/backdoorscan
ENV PATH=/opt/backdoorscan/bin:$PATH
WORKDIR /source
COPY constraints.txt ./
# Elsewhere the same versions come with gigabytes of CUDA.
RUN pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu --requirement constraints.txt
COPY pyproject.toml README.md LICENSE ./
COPY backdoorscan backdoorscan
COPY plugins plugins
RUN pip install --no-cache-dir --constraint constraints.txt .

FROM python:${PYTHON}-slim
COPY --from=build /opt/backdoorscan /opt/backdoorscan
# Whoever the container runs as, --user among them, may write there.
RUN mkdir --mode 1777 /cache
ENV PATH=/opt/backdoorscan/bin:$PATH \
    HOME=/tmp \
    BACKDOORSCAN_CACHE_DIR=/cache \
    MPLCONFIGDIR=/tmp/matplotlib \
    ORT_DISABLE_TELEMETRY=1
USER 65532:65532
WORKDIR /work
ENTRYPOINT ["backdoorscan"]
