# nano, or a checkpoint from /checkpoint, over HTTP: docker build -t emu3 . && docker run -p 8000:8000 -e EMU3_KEY=... emu3
FROM python:3.11-slim
WORKDIR /emu3
COPY pyproject.toml constraints.txt README.md LICENSE NOTICE ./
COPY src src
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu --constraint constraints.txt '.[serve]' \
    && useradd --create-home emu3
USER emu3
EXPOSE 8000
# exec, so that the server gets the signal to stop and finishes its work.
CMD ["sh", "-c", "exec emu3 serve ${EMU3_MODEL:-nano} --host 0.0.0.0 --api-key \"${EMU3_KEY:?set EMU3_KEY}\" --allow-host '*'"]
