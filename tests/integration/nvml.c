/* libnvidia-ml.so.1 for machines without a GPU: answers as the real driver did for the devices that
 * $RECORDED_GPUS lists as "name=MiB;name=MiB"; without it there is no driver. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    SUCCESS = 0,
    INVALID_ARGUMENT = 2,
    INSUFFICIENT_SIZE = 7,
    DRIVER_NOT_LOADED = 9,
    MOST = 16
};

typedef struct { char name[96]; unsigned long long mib; } device;
typedef struct { unsigned long long total, free, used; } memory;

static device devices[MOST];
static unsigned count;

static int begin(void) {
    const char *list = getenv("RECORDED_GPUS");
    if (!list) return DRIVER_NOT_LOADED;
    char copy[4096], *save = NULL;
    snprintf(copy, sizeof copy, "%s", list);
    count = 0;
    for (char *entry = strtok_r(copy, ";", &save); entry && count < MOST;
         entry = strtok_r(NULL, ";", &save))
        if (sscanf(entry, "%95[^=]=%llu", devices[count].name, &devices[count].mib) == 2) count++;
    return SUCCESS;
}

int nvmlInit_v2(void) { return begin(); }
int nvmlInitWithFlags(unsigned flags) { (void)flags; return begin(); }
int nvmlShutdown(void) { return SUCCESS; }
int nvmlDeviceGetCount_v2(unsigned *out) { *out = count; return SUCCESS; }

int nvmlDeviceGetHandleByIndex_v2(unsigned index, device **out) {
    if (index >= count) return INVALID_ARGUMENT;
    *out = &devices[index];
    return SUCCESS;
}

int nvmlDeviceGetName(device *it, char *out, unsigned length) {
    snprintf(out, length, "%s", it->name);
    return SUCCESS;
}

int nvmlDeviceGetUUID(device *it, char *out, unsigned length) {
    snprintf(out, length, "GPU-%04x-recorded", (unsigned)(it - devices));
    return SUCCESS;
}

/* $RECORDED_STATE: "memory's percent, used MiB, milliwatts, degrees", of each device. */
static unsigned state(int field) {
    const char *text = getenv("RECORDED_STATE");
    unsigned found[4] = {0};
    if (text) sscanf(text, "%u %u %u %u", found, found + 1, found + 2, found + 3);
    return found[field];
}

int nvmlDeviceGetPowerUsage(device *it, unsigned *out) { (void)it; *out = state(2); return SUCCESS; }

int nvmlDeviceGetTemperature(device *it, int sensor, unsigned *out) {
    (void)it, (void)sensor;
    *out = state(3);
    return SUCCESS;
}

int nvmlDeviceGetMemoryInfo(device *it, memory *out) {
    out->total = it->mib << 20;
    out->used = (unsigned long long)state(1) << 20;
    out->free = out->total - out->used;
    return SUCCESS;
}

/* $RECORDED_LOAD names a file: for each device "percent pid", the pid 0 if none is told. */
static int load(device *it, unsigned *percent, unsigned *pid) {
    const char *path = getenv("RECORDED_LOAD");
    FILE *file = path ? fopen(path, "r") : NULL;
    *percent = *pid = 0;
    if (!file) return SUCCESS;
    for (long i = 0; i <= it - devices; i++)
        if (fscanf(file, "%u %u;", percent, pid) != 2) *percent = *pid = 0;
    fclose(file);
    return SUCCESS;
}

int nvmlDeviceGetUtilizationRates(device *it, unsigned *out) {
    unsigned pid;
    out[1] = state(0);
    return load(it, out, &pid);
}

typedef struct { unsigned pid; unsigned long long used; unsigned gpu, compute; } process;

int nvmlDeviceGetComputeRunningProcesses_v3(device *it, unsigned *room, process *out) {
    unsigned percent, pid;
    load(it, &percent, &pid);
    if (pid && !*room) return *room = 1, INSUFFICIENT_SIZE;
    *room = pid != 0;
    if (pid) out[0] = (process){.pid = pid};
    return SUCCESS;
}

const char *nvmlErrorString(int code) { return code == DRIVER_NOT_LOADED ? "Driver Not Loaded" : "Error"; }
