# The service alone: no TensorFlow, no compiler, not root. Build: docker build -t hemacrypt .
# Run: docker run -p 127.0.0.1:50051:50051 -v keys:/var/lib/hemacrypt -v ./bundles:/bundles:ro hemacrypt /bundles/leukaemia

FROM python:3.11-slim AS build
WORKDIR /source
COPY pyproject.toml constraints.txt hatch_build.py README.md LICENSE ./
COPY proto proto
COPY hemacrypt hemacrypt
COPY service service
COPY client_sdk client_sdk
COPY training training
# The same pinned versions that the tests passed with; the build generates the protobuf code.
RUN python -m venv /opt/hemacrypt \
 && PIP_CONSTRAINT=constraints.txt /opt/hemacrypt/bin/pip install --no-cache-dir '.[service]'

FROM python:3.11-slim
RUN useradd --system --uid 10001 --home-dir /var/lib/hemacrypt hemacrypt \
 && install -d -o hemacrypt -m 0700 /var/lib/hemacrypt
COPY --from=build /opt/hemacrypt /opt/hemacrypt
ENV PATH=/opt/hemacrypt/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HEMACRYPT_HOST=0.0.0.0 \
    HEMACRYPT_PORT=50051 \
    HEMACRYPT_STORE=/var/lib/hemacrypt
USER hemacrypt
VOLUME /var/lib/hemacrypt
EXPOSE 50051
HEALTHCHECK --interval=15s --timeout=6s --start-period=30s CMD ["python", "-m", "service.healthcheck"]
STOPSIGNAL SIGTERM
# Without an argument the bundle `balanced` of the zoo is served.
ENTRYPOINT ["hemacrypt", "serve"]
