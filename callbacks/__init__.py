"""Lightning callbacks: what happens around the algorithm and is no part of it.

============================  ==================================================================
`length_mask`                 `LengthMaskSchedule`: τ as a function of the optimizer step
                              `TargetBand`: τ as a function of the captions' lengths
`balance_weights`             `BalanceWeights`: weights that move towards the reward that lags
`mastery`                     `Mastery`: images that the policy has mastered come less often
`rollout_log`                 `RolloutLog`: every rollout with its judgments, to Parquet and loggers
`logger_media`                its images and captions in TensorBoard, W&B, MLflow, Trackio
`progress`                    `CaptionProgressBar`: the rewards, live or as plain lines
`curves`                      `RunCurves`: ``metrics.csv`` as one picture
`report`                      `RunReport`: ``report.html``, the folder's README, the export's model card
`validate_ends`               `ValidateAtEnds`: validation before the first and after the last update
`checkpoint`                  `RunCheckpoint`: ``last.ckpt``, also when the run is interrupted
`run_config`                  `SaveRunConfig`: ``config.yaml``, and what a run that goes on changes
`export`                      `ExportPolicy`: the trained policy in Hugging Face's format
`caption_writer`              `CaptionWriter`: captions of ``predict`` as JSON lines, resumable
============================  ==================================================================

A configuration names them by ``class_path``, for example ``callbacks.length_mask.LengthMaskSchedule``.
"""
