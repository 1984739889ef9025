// Command example lists the blueprints and seeds of a live mesh, then follows its runs for a few messages:
//
//	go run ./cmd/example runs/latest/addresses.json [MESSAGES]
package main

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"esper.dev/client"
	kasmina "esper.dev/client/gen/esper/kasmina/v1"
	tolaria "esper.dev/client/gen/esper/tolaria/v1"
	urza "esper.dev/client/gen/esper/urza/v1"
)

func main() {
	if len(os.Args) != 2 && len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: example ADDRESSES.JSON [MESSAGES]")
		os.Exit(2)
	}
	messages := 5
	if len(os.Args) == 3 {
		number, err := strconv.Atoi(os.Args[2])
		if err != nil {
			fail(err)
		}
		messages = number
	}
	if err := run(os.Args[1], messages); err != nil {
		fail(err)
	}
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "example:", err)
	os.Exit(1)
}

func run(path string, messages int) error {
	mesh, err := client.FromFile(path)
	if err != nil {
		return err
	}
	defer mesh.Close()
	// One deadline for all; a service of your own gives each call its own.
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()

	toUrza, err := mesh.Connection("urza")
	if err != nil {
		return err
	}
	library, err := urza.NewBlueprintServiceClient(toUrza).ListBlueprints(ctx, &urza.ListBlueprintsRequest{PageSize: 1000})
	if err != nil {
		return err
	}
	for _, blueprint := range library.GetBlueprints() {
		fmt.Println("blueprint", blueprint.GetName(), blueprint.GetSpec().GetFamily())
	}

	toKasmina, err := mesh.Connection("kasmina")
	if err != nil {
		return err
	}
	found, err := kasmina.NewKasminaServiceClient(toKasmina).ListSeeds(ctx, &kasmina.ListSeedsRequest{Run: "runs/-", PageSize: 1000})
	if err != nil {
		return err
	}
	for _, seed := range found.GetSeeds() {
		fmt.Println("seed", seed.GetName(), seed.GetSlot(), strings.TrimPrefix(seed.GetState().String(), "SEED_STATE_"))
	}

	toTolaria, err := mesh.Connection("tolaria")
	if err != nil {
		return err
	}
	watch, err := tolaria.NewTrainingServiceClient(toTolaria).WatchRun(ctx, &tolaria.WatchRunRequest{})
	if err != nil {
		return err
	}
	for ; messages > 0; messages-- {
		update, err := watch.Recv()
		if err != nil {
			return err
		}
		change := strings.TrimPrefix(update.GetChange().String(), "CHANGE_TYPE_")
		run := update.GetRun()
		if run == nil { // a bookmark: all that exists has been told
			fmt.Println("watch", change)
			continue
		}
		state := strings.TrimPrefix(run.GetState().String(), "RUN_STATE_")
		fmt.Printf("watch %s %s %s epoch %d/%d\n", change, run.GetName(), state, run.GetEpoch(), run.GetEpochs())
	}
	return nil
}
