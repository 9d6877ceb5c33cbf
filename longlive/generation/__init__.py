"""How a video is made: the block loop, prompts over time, live sessions, the pipeline."""
