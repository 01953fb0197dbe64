// Writes down what a process does on the GPU: a library that the driver loads into it where CUDA_INJECTION64_PATH names it.
// Each line of the file that MMGP_TRACE names is an activity: what it is, when it began and ended in nanoseconds, and a
// kernel's name. `run.sh --trace` compiles it, `trace.py` reads the lines.

#include <cupti.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

static FILE *to;

static void CUPTIAPI asked(uint8_t **buffer, size_t *size, size_t *most) {
    *size = 8 << 20;
    *most = 0;
    *buffer = aligned_alloc(8, *size);
}

static void CUPTIAPI filled(CUcontext context, uint32_t stream, uint8_t *buffer, size_t size, size_t valid) {
    (void)context, (void)stream, (void)size;
    CUpti_Activity *record = NULL;
    while (cuptiActivityGetNextRecord(buffer, valid, &record) == CUPTI_SUCCESS) {
        if (record->kind == CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) {
            const CUpti_ActivityKernel10 *kernel = (const CUpti_ActivityKernel10 *)record;
            fprintf(to, "kernel %lu %lu %s\n", kernel->start, kernel->end, kernel->name);
        } else if (record->kind == CUPTI_ACTIVITY_KIND_MEMSET) {
            const CUpti_ActivityMemset4 *set = (const CUpti_ActivityMemset4 *)record;
            fprintf(to, "memset %lu %lu\n", set->start, set->end);
        } else if (record->kind == CUPTI_ACTIVITY_KIND_MEMCPY) {
            const CUpti_ActivityMemcpy6 *copy = (const CUpti_ActivityMemcpy6 *)record;
            fprintf(to, "copy%d %lu %lu\n", copy->copyKind, copy->start, copy->end);
        }
    }
    free(buffer);
}

static void end(void) {
    cuptiActivityFlushAll(1);
    fclose(to);
}

int InitializeInjection(void) {
    const char *path = getenv("MMGP_TRACE");
    to = path ? fopen(path, "w") : NULL;
    if (!to) return 0;
    if (cuptiActivityRegisterCallbacks(asked, filled) != CUPTI_SUCCESS ||
        cuptiActivityEnable(CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) != CUPTI_SUCCESS ||
        cuptiActivityEnable(CUPTI_ACTIVITY_KIND_MEMSET) != CUPTI_SUCCESS ||
        cuptiActivityEnable(CUPTI_ACTIVITY_KIND_MEMCPY) != CUPTI_SUCCESS) {
        fprintf(stderr, "the GPU's activities cannot be written down\n");
        return 0;
    }
    atexit(end);
    return 1;
}
