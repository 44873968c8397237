"""vLLM as rollout engine, in the trainer's process or as servers.

``inprocess.py``  `VLLMInProcess`: an engine on the trainer's device
``server.py``     `VLLMServer`: captions from ``vllm serve`` on other GPUs and hosts
``client.py``     one server over HTTP
``requests.py``   what is asked of vLLM for an image, and checks of what comes back
``weights.py``    the trainer's end of a weight sync
``worker.py``     the other end, inside vLLM's workers
``start.py``      what vLLM is started with; starting and ending it in process
"""
