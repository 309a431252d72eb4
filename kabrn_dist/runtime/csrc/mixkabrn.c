/* MixKABRN runtime, in C99: libc, libm and threads only.
 *
 *     cc -O2 mixkabrn.c -o mixkabrn -lm -lpthread
 *
 * Parts: 1 bytes and errors, 2 sha256, 3 model file, 4 kernels, 5 threads, 6 forward pass, 7 state, 8 tokenizer,
 * 9 sampling, 10 command line. Docs: docs/model-file.md, docs/runtime.md. */
#include "mixkabrn.h"

/* ---- 1 bytes and errors ---- */

/* ---- 2 sha256 ---- */

/* ---- 3 model file ---- */

/* ---- 4 kernels ---- */

/* ---- 5 threads ---- */

/* ---- 6 forward pass ---- */

/* ---- 7 state ---- */

/* ---- 8 tokenizer ---- */

/* ---- 9 sampling ---- */

/* ---- 10 command line ---- */
