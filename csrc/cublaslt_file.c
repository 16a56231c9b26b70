/* cublaslt_file.c: chosen algorithms on disk (see cublaslt.h). Several processes may share the
 * file: it is read whole, and replaced as a whole by one that has a line more. */
#define _GNU_SOURCE
#include "cublaslt.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { MOST_BYTES = 1 << 20 }; /* some thousand choices */

/* The file's text, to be freed, empty where there is no file; NULL where it is no file of ours, or
 * none to replace: /dev/null, a folder. */
static char *read_file(const char *path) {
    struct stat status;
    if (!stat(path, &status) && !S_ISREG(status.st_mode)) return NULL;
    char *text = malloc(MOST_BYTES + 1);
    if (!text) return NULL;
    FILE *file = fopen(path, "rb");
    size_t length = file ? fread(text, 1, MOST_BYTES + 1, file) : 0;
    if (file) fclose(file);
    if (length <= MOST_BYTES && (!length || text[length - 1] == '\n')) {
        text[length - !!length] = 0; /* without the last line's end */
        return text;
    }
    free(text);
    return NULL;
}

/* What the line of this key holds behind the tab. */
static const char *find_line(const char *text, const char *key) {
    size_t length = strlen(key);
    for (const char *line = text; line; line = strchr(line, '\n')) {
        line += *line == '\n';
        if (!strncmp(line, key, length) && line[length] == '\t') return line + length + 1;
    }
    return NULL;
}

bool gemm_file_find(const char *key, uint64_t algorithm[8]) {
    const char *path = getenv("FLATOUT_GEMM_CACHE");
    char *text = path && *path ? read_file(path) : NULL;
    const char *at = text ? find_line(text, key) : NULL;
    int words = 0, used = 0;
    for (; at && words < 8 && sscanf(at, "%16" SCNx64 "%n", &algorithm[words], &used) == 1; words++)
        at += used;
    free(text);
    return words == 8;
}

static bool write_file(FILE *file, const char *text, const char *key, const uint64_t algorithm[8]) {
    bool ok = !*text || fprintf(file, "%s\n", text) > 0;
    ok = ok && fprintf(file, "%s\t", key) > 0;
    for (int word = 0; ok && word < 8; word++)
        ok = fprintf(file, "%016" PRIx64 "%c", algorithm[word], word < 7 ? ' ' : '\n') > 0;
    return !fclose(file) && ok;
}

/* A cache that cannot be written is none: no error. */
void gemm_file_add(const char *key, const uint64_t algorithm[8]) {
    const char *path = getenv("FLATOUT_GEMM_CACHE");
    char temporary[4096];
    if (!path || !*path ||
        snprintf(temporary, sizeof temporary, "%s.XXXXXX", path) >= (int)sizeof temporary)
        return;
    char *text = read_file(path);
    int handle = text && !find_line(text, key) ? mkstemp(temporary) : -1;
    FILE *file = handle < 0 ? NULL : fdopen(handle, "wb");
    if (file) {
        fchmod(handle, 0644); /* as others may read it; mkstemp's is the owner's alone */
        if (!write_file(file, text, key, algorithm) || rename(temporary, path)) unlink(temporary);
    }
    free(text);
}
