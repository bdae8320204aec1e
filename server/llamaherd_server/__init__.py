"""An OpenAI-compatible server over llama.cpp: one front end, one supervised engine process per model."""
