package dev.esper.client;

import dev.esper.kasmina.v1.KasminaServiceGrpc;
import dev.esper.kasmina.v1.ListSeedsRequest;
import dev.esper.kasmina.v1.Seed;
import dev.esper.tolaria.v1.Run;
import dev.esper.tolaria.v1.TrainingServiceGrpc;
import dev.esper.tolaria.v1.WatchRunRequest;
import dev.esper.tolaria.v1.WatchRunResponse;
import dev.esper.urza.v1.Blueprint;
import dev.esper.urza.v1.BlueprintServiceGrpc;
import dev.esper.urza.v1.ListBlueprintsRequest;
import io.grpc.StatusRuntimeException;
import java.io.IOException;
import java.nio.file.Path;
import java.util.Iterator;
import java.util.concurrent.TimeUnit;

/** Lists the blueprints and seeds of a live mesh, then follows its runs for a few messages. */
public final class Example {
  private Example() {}

  /** Arguments: addresses.json of a run folder, then the number of messages (5). */
  public static void main(String[] arguments) throws InterruptedException {
    if (arguments.length < 1 || arguments.length > 2) {
      System.err.println("usage: Example ADDRESSES.JSON [MESSAGES]");
      System.exit(2);
    }
    int messages = arguments.length == 2 ? Integer.parseInt(arguments[1]) : 5;
    try (Mesh mesh = Mesh.fromFile(Path.of(arguments[0]))) {
      show(mesh, messages);
    } catch (IOException | StatusRuntimeException error) {
      System.err.println("Example: " + error.getMessage());
      System.exit(1);
    }
  }

  private static void show(Mesh mesh, int messages) {
    var library = BlueprintServiceGrpc.newBlockingStub(mesh.channel("urza")).withDeadlineAfter(10, TimeUnit.SECONDS);
    var all = ListBlueprintsRequest.newBuilder().setPageSize(1000).build();
    for (Blueprint blueprint : library.listBlueprints(all).getBlueprintsList()) {
      System.out.println("blueprint " + blueprint.getName() + " " + blueprint.getSpec().getFamily());
    }

    var execution = KasminaServiceGrpc.newBlockingStub(mesh.channel("kasmina")).withDeadlineAfter(10, TimeUnit.SECONDS);
    var everywhere = ListSeedsRequest.newBuilder().setRun("runs/-").setPageSize(1000).build();
    for (Seed seed : execution.listSeeds(everywhere).getSeedsList()) {
      String state = seed.getState().name().replace("SEED_STATE_", "");
      System.out.println("seed " + seed.getName() + " " + seed.getSlot() + " " + state);
    }

    // The deadline is of the whole stream.
    var training = TrainingServiceGrpc.newBlockingStub(mesh.channel("tolaria")).withDeadlineAfter(60, TimeUnit.SECONDS);
    Iterator<WatchRunResponse> watch = training.watchRun(WatchRunRequest.getDefaultInstance());
    for (; messages > 0 && watch.hasNext(); messages--) {
      WatchRunResponse update = watch.next();
      String change = update.getChange().name().replace("CHANGE_TYPE_", "");
      if (!update.hasRun()) { // a bookmark: all that exists has been told
        System.out.println("watch " + change);
        continue;
      }
      Run run = update.getRun();
      String state = run.getState().name().replace("RUN_STATE_", "");
      System.out.printf(
          "watch %s %s %s epoch %d/%d%n", change, run.getName(), state, run.getEpoch(), run.getEpochs());
    }
  }
}
