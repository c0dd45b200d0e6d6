"""Programs that run in an environment with an engine, without winnow: each holds one model and answers requests.

Every line of the standard input is a JSON object, and so is every answer on the standard output: the first is the job, answered
once the model is loaded; the others are prompts and the number of tokens that follow, answered by seconds and bytes.
"""
