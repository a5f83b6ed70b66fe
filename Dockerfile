# fedmllm on a CPU, for sites and servers of a federation or for experiments:
#
#     docker build --tag fedmllm .
#     docker run --rm --volume "$PWD:/work" --user "$(id -u):$(id -g)" fedmllm run quickstart
#
# Without TORCH_INDEX, PyTorch is the default build, which brings several gigabytes of GPU libraries. With the address of PyTorch's
# index of CPU builds (its installation page has it), the image is a fraction of that size:
#
#     docker build --build-arg TORCH_INDEX=<address> --tag fedmllm .

FROM python:3.13-slim AS build
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.13-slim
ARG TORCH_INDEX=""
COPY requirements/constraints.txt /tmp/constraints.txt
RUN pip install --no-cache-dir --constraint /tmp/constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch
COPY --from=build /wheels /tmp/wheels
RUN pip install --no-cache-dir --constraint /tmp/constraints.txt "$(ls /tmp/wheels/*.whl)[flower,privacy,secure]" \
    && rm -r /tmp/wheels /tmp/constraints.txt \
    && useradd --uid 1000 --create-home fedmllm \
    && mkdir --mode=1777 /cache /work
# Folders that any user can write to, because `--user` makes files on mounted folders the caller's own.
ENV FEDMLLM_CACHE=/cache HOME=/cache PYTHONUNBUFFERED=1
USER 1000
WORKDIR /work
ENTRYPOINT ["fedmllm"]
CMD ["--help"]
